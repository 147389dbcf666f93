"""Figures of a search for each group's ratio: its front, and the ratios found beside the uniform ones."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from dist_prune.report.figures import GREY, INK, PALE, subplots

BLUE, ORANGE = "#1f77b4", "#ff7f0e"


def search_figures(search: Mapping[str, Any]) -> list[tuple[str, Figure]]:
    """Plot what a search found.

    Args:
        search: ``search`` of report.json; empty: no figures.

    Returns:
        (title, figure) pairs.
    """
    titled = []
    if search.get("lines"):
        titled.append(("Candidates and their front", _front_figure(search)))
    if search.get("groups"):
        titled.append(("Kept channels: found and uniform", _ratios_figure(search["groups"])))
    return titled


def _front_figure(search: Mapping[str, Any]) -> Figure:
    figure, panels = subplots(10, 3.4)
    axes = panels[0, 0]
    for origin, colour in (("drawn", PALE), ("varied", GREY), ("crossed", INK)):
        lines = [line for line in search["lines"] if line["origin"] == origin and line["figure"] is not None]
        axes.scatter(
            [100 * line["share"] for line in lines], [line["figure"] for line in lines], 9, colour, label=origin
        )
    starts = [line for line in search["lines"] if line["origin"] not in ("drawn", "varied", "crossed")]
    for line in starts:
        if line["figure"] is not None:
            axes.scatter([100 * line["share"]], [line["figure"]], 16, ORANGE)
            axes.annotate(f" {line['origin']}", (100 * line["share"], line["figure"]), fontsize=7)
    front = search["front"]
    shares = [100 * line["share"] for line in front]
    axes.step(shares, [line["figure"] for line in front], BLUE, where="post", marker="o", markersize=3, label="front")
    axes.set(xlabel=f"{search['cost']} left, %", ylabel=search["figure"])
    axes.legend(frameon=False, fontsize=7, ncols=4)
    return figure


def _ratios_figure(groups: list[Mapping[str, Any]]) -> Figure:
    figure, panels = subplots(10, max(2.2, min(0.2 * len(groups) + 1.1, 40)))
    axes, positions = panels[0, 0], range(len(groups))
    axes.barh(positions, [100] * len(groups), color=PALE)
    axes.barh(positions, [100 * group["found"] / group["dense"] for group in groups], color=BLUE, label="found")
    uniform = [100 * group["uniform"] / group["dense"] for group in groups]
    axes.scatter(uniform, positions, 40, ORANGE, marker="|", label="uniform", zorder=3)
    for position, group in enumerate(groups):
        text = f" {group['found']} (uniform {group['uniform']}) of {group['dense']}"
        axes.text(100, position, text, va="center", fontsize=7)
    axes.set_yticks(list(positions), [group["name"] for group in groups], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("channels kept, %")
    axes.margins(x=0.12, y=0.01)
    axes.legend(frameon=False, fontsize=7, loc="lower left")
    return figure

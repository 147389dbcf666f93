"""The page of ``dist-prune compare``: its tables and Pareto plots."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from dist_prune.pruning.selection.cost import report_costs
from dist_prune.report.figures import GREY, INK, subplots, svg
from dist_prune.report.html import render

Rows = Sequence[dict[str, Any]]


def render_comparison(
    title: str, tables: Sequence[tuple[str, list[str], list[list[str]]]], rows: Rows, papers: Rows, batch: str
) -> str:
    """The comparison page, as HTML.

    Args:
        title: Headline of the page.
        tables: (title, column heads, rows of cells) of each table.
        rows: Figures of each recipe (see ``cli/compare.py``).
        papers: The papers' points: ``change`` of top-1, and shares of costs under ``<cost>_share``.
        batch: Batch size of the latency.
    """
    plots = svg(pareto(rows, papers, batch)) if rows else ""
    return render("compare.html.j2", title=title, tables=tables, recipes=len(rows), plots=plots)


def pareto(rows: Rows, papers: Rows, batch: str) -> Figure:
    """Plot top-1 against each cost and the latency, and below the change of top-1 against the shares that are kept.

    Args:
        rows: Figures of each recipe.
        papers: The papers' points.
        batch: Batch size of the latency.
    """
    costs = [cost for cost in report_costs() if any(row[cost.name] is not None for row in rows)]
    figure, plots = subplots(13 / 3 * (len(costs) + 1), 8, 2, len(costs) + 1)
    names = sorted({row["backbone"] for row in rows})
    colours = {name: f"C{index % 10}" for index, name in enumerate(names)}
    amounts = [(cost.name, f"{cost.unit} ({cost.prefix})" if cost.prefix else cost.unit) for cost in costs]
    absolute = [*amounts, ("ms", f"ms, batch {batch}")]
    relative = [(f"{cost.name}_share", f"share of the {cost.unit} kept") for cost in costs]
    speed = ("speedup", f"speed-up, batch {batch}")
    for axes, (key, label) in zip(plots[0], absolute, strict=True):
        _scatter(axes, rows, key, "top1", colours)
        axes.set(xlabel=label, ylabel="top-1 %")
        _front(axes, [(row[key], row["top1"]) for row in rows if _good(row, key)])
    for axes, (key, label) in zip(plots[1], (*relative, speed), strict=True):
        _scatter(axes, rows, key, "change", colours)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set(xlabel=label, ylabel="top-1 against dense, points")
        if key != "speedup":
            for number, point in enumerate(point for point in papers if point.get(key) is not None):
                axes.plot(point[key], point["change"], "x", color="#d62728", label="" if number else "paper")
    for row in rows:  # the dense network of each run
        for axes, key in zip(plots[0], (key for key, _ in absolute), strict=True):
            if not _good(row, key):
                continue
            dense_cost = row["dense_ms"] if key == "ms" else row[key] / row[f"{key}_share"]
            axes.plot(dense_cost, row["dense_top1"], "o", markerfacecolor="none", color=colours[row["backbone"]])
    for axes in plots.flat:
        axes.margins(0.08)
    plots[1][0].legend(frameon=False, fontsize=8)
    return figure


def _scatter(axes: Any, rows: Rows, x: str, y: str, colours: dict[str, str]) -> None:
    labelled = set()
    for row in rows:
        name = row["backbone"]
        if x not in ("ms", "speedup") and row[x] is None:  # the report is older than the cost
            continue
        if not _good(row, x):  # its accuracy is known, its time is not: at the axis
            edge_transform = axes.get_yaxis_transform()
            axes.plot(0.015, row[y], "<", color=GREY, transform=edge_transform, clip_on=False, gid=f"doubtful {x}")
            continue
        axes.errorbar(
            row[x],
            row[y],
            yerr=row["top1_std"] or 0,
            fmt="o",
            color=colours[name],
            capsize=3,
            label="" if name in labelled else name,
        )
        labelled.add(name)


def _good(row: dict[str, Any], key: str) -> bool:
    """Whether a figure of a row can be plotted: the cost is present, the measured time is reliable."""
    return row["reliable"] if key in ("ms", "speedup") else row[key] is not None


def _front(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """Draw the Pareto front: the runs that are more accurate than all runs of lower cost."""
    best, front = float("-inf"), []
    for cost, top1 in sorted(points, key=lambda point: (point[0], -point[1])):
        if top1 > best:
            best = top1
            front.append((cost, top1))
    if front:
        axes.plot(*zip(*front, strict=True), color=INK, linewidth=0.8, zorder=0)

"""The page of ``dist-prune ratio-curves``: the curves, and a table whose cells are dark where the figure is worse."""

import math
from collections.abc import Mapping
from typing import Any

from dist_prune.report.cut_speed import place_text, ratio_of, speed_card, speed_text, speed_title
from dist_prune.report.headline import Card, Sentence
from dist_prune.report.html import render
from dist_prune.report.plots import Line, Mark, Plot, figure
from dist_prune.report.tables import loss_title, standard_error, task_of
from dist_prune.tasks.primary import PrimaryFigure

NAMED = 8  # number of groups with a colour, a shape and a name in the plots; the others are quiet


def render_ratio_curves(name: str, method: str, body: Mapping[str, Any], suggestion: str) -> str:
    """The page as HTML.

    Args:
        name: Name of the recipe.
        method: Name of the method.
        body: The body of ratio_curves.json.
        suggestion: The suggested keep ratios, as ``key=value`` for a command line.
    """
    return render(
        "ratio_curves.html.j2",
        name=name,
        method=method,
        body=body,
        sentences=_verdict(body),
        cards=_cards(method, body),
        suggestion=suggestion,
        primary=_primary(body),
        lost=_lost(body),
        figures=[curves_figure(body)],
        rows=_rows(body),
        times=place_text(body["times"]) if body.get("times") else "",
        speeds=_speed_rows(body),
        repaired=any(point.get("repaired") is not None for group in body["groups"] for point in group["points"]),
    )


def _primary(body: Mapping[str, Any]) -> PrimaryFigure:
    return PrimaryFigure.of(task_of(body))


def _lost(body: Mapping[str, Any]) -> str:
    """The loss at which ratios are suggested, in words."""
    return f"{body['max_drop']:g} point(s)" if _primary(body).percent else _primary(body).points(body["max_drop"])


def _verdict(body: Mapping[str, Any]) -> list[Sentence]:
    groups, drop = body["groups"], _lost(body)
    free, least = body["keep_ratios"], min(point["ratio"] for point in groups[0]["points"])
    tough = [group["group"] for group in groups if free.get(group["group"]) == least]
    sentences = [
        Sentence("plain", f"{groups[0]['group']} is the most sensitive group, {groups[-1]['group']} the least.")
    ]
    if len(free) < len(groups):
        text = f"{len(groups) - len(free)} of {len(groups)} groups alone lose more than {drop} at every ratio."
        sentences.append(Sentence("doubt", text))
    if tough:
        text = f"{len(tough)} of {len(groups)} groups alone lose at most {drop} at the ratio {least:g}."
        sentences.append(Sentence("good", text))
    return sentences


def _cards(method: str, body: Mapping[str, Any]) -> list[Card]:
    primary, images = _primary(body), body["images"]
    dense = _number(body["dense"][primary.key])
    error = standard_error({"": {primary.key: dense, "images": images}}, "", primary.key)
    note = f"± {error:.2f}, {images:,} images" if error is not None else f"{images:,} images"
    return [
        Card("method", method, "nothing finetuned"),
        Card(f"dense {primary.title}", primary.number(dense), note),
        Card("dense loss", f"{body['dense']['loss']:.4f}"),
        Card("groups", str(len(body["groups"])), f"each alone, {len(body['groups'][0]['points'])} ratios"),
        Card("ratios suggested", str(len(body["keep_ratios"])), f"at most {_lost(body)} lost"),
        speed_card(body.get("times"), _networks(body)),
    ]


def _networks(body: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What was cut, and the facts of the network, of every point."""
    return [(f"{group['group']} at {point['ratio']:g}", point) for group in body["groups"] for point in group["points"]]


def curves_figure(body: Mapping[str, Any]) -> dict[str, Any]:
    """Plot figure, loss and speed-up against the keep ratio, a curve for each group.

    The figure of repaired networks is dotted. Speed-ups of times that are not reliable are hollow and beside the curve.

    Args:
        body: The body of ratio_curves.json.
    """
    groups, plots, primary = body["groups"], [], _primary(body)
    for key, title in ((primary.key, primary.axis_title), ("loss", loss_title(primary.key))):
        dense, lines = _number(body["dense"][key]), []
        for rank, group in reversed(list(enumerate(groups))):
            series = rank if rank < NAMED else None
            points = [(1.0, dense), *((p["ratio"], _number(p[key])) for p in group["points"])]
            lines.append(Line(points, group["group"], series, marked=series is not None))
            if key == primary.key and series is not None and group["points"][0].get("repaired") is not None:
                repaired = [(1.0, dense), *((p["ratio"], _number(p["repaired"])) for p in group["points"])]
                lines.append(Line(repaired, f"{group['group']}, repaired", series, "dashed"))
        x = "share of the group's channels kept"
        plots.append(Plot(x, title, lines=lines, levels=[(dense, f"dense: {dense:.4g}")], falling=True))
    if body.get("times"):
        plots.append(_speed_plot(body))
    names: list[tuple[int | None, str]] = [(rank, group["group"]) for rank, group in enumerate(groups[:NAMED])]
    if len(groups) > NAMED:
        names.append((None, f"{len(groups) - NAMED} less sensitive groups"))
    return figure("", plots, names)


def _speed_plot(body: Mapping[str, Any]) -> Plot:
    lines, marks = [], []
    for rank, group in reversed(list(enumerate(body["groups"]))):
        series, points = rank if rank < NAMED else None, group["points"]
        curve = [(1.0, 1.0), *((p["ratio"], p["speedup"]) for p in points if p["speedup"] is not None)]
        lines.append(Line(curve, group["group"], series))
        for point in points if series is not None else ():
            title = f"{group['group']} at {point['ratio']:g}: {speed_title(point)}"
            hollow = point["speedup"] is None
            marks.append(Mark(point["ratio"], ratio_of(point) or math.nan, title, rank, hollow))
    x, y = "share of the group's channels kept", f"speed-up, {place_text(body['times'])}"
    return Plot(x, y, lines=lines, marks=marks, levels=[(1.0, "dense: 1.00x")], falling=True)


def _speed_rows(body: Mapping[str, Any]) -> list[tuple[str, int, list[tuple[str, str]]]]:
    """Group, width, and (text, title) of each cell of the table of speed-ups; empty if nothing was timed."""
    if not body.get("times"):
        return []
    return [
        (group["group"], group["width"], [(speed_text(point), speed_title(point)) for point in group["points"]])
        for group in body["groups"]
    ]


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _rows(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table: each cell with its share of the largest loss of the figure."""
    primary, groups = _primary(body), body["groups"]
    dense = _number(body["dense"][primary.key])
    losses = [[primary.lost(dense, _number(point[primary.key])) for point in group["points"]] for group in groups]
    finite = [loss for own in losses for loss in own if math.isfinite(loss)]
    largest = max(body["max_drop"] if not primary.percent else 1.0, *finite, 1e-12)

    def share(loss: float) -> float:
        return max(0.0, loss / largest) if math.isfinite(loss) else 1.0

    return [
        {
            "group": group["group"],
            "width": group["width"],
            "cells": [
                (point, share(loss), _change(primary, loss), _texts(primary, point))
                for point, loss in zip(group["points"], own, strict=True)
            ],
            "suggested": body["keep_ratios"].get(group["group"]),
        }
        for group, own in zip(groups, losses, strict=True)
    ]


def _change(primary: PrimaryFigure, loss: float) -> str:
    """How the figure differs from the dense network's, for a pointer that rests on a cell."""
    if primary.percent:
        return f"{loss:.2f} points {'less' if primary.higher_is_better else 'more'}"
    return f"{primary.name} {primary.signed(-loss if primary.higher_is_better else loss)}"


def _texts(primary: PrimaryFigure, point: Mapping[str, Any]) -> tuple[str, str]:
    """The figure of a point, and that after the repair, empty without one."""
    repaired = point.get("repaired")
    return primary.number(_number(point[primary.key])), "" if repaired is None else f" ({primary.number(repaired)})"

"""The page of ``dist-prune ratio-curves``: the curves, and a table whose cells are dark where top-1 is lost."""

from collections.abc import Mapping
from typing import Any

from dist_prune.report.headline import Card, Sentence
from dist_prune.report.html import render
from dist_prune.report.plots import Line, Plot, figure
from dist_prune.report.tables import standard_error

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
        figures=[curves_figure(body)],
        rows=_rows(body),
        repaired=any(point.get("repaired") is not None for group in body["groups"] for point in group["points"]),
    )


def _verdict(body: Mapping[str, Any]) -> list[Sentence]:
    groups, drop = body["groups"], body["max_drop"]
    free, least = body["keep_ratios"], min(point["ratio"] for point in groups[0]["points"])
    tough = [group["group"] for group in groups if free.get(group["group"]) == least]
    sentences = [
        Sentence("plain", f"{groups[0]['group']} is the most sensitive group, {groups[-1]['group']} the least.")
    ]
    if len(free) < len(groups):
        text = (
            f"{len(groups) - len(free)} of {len(groups)} groups alone lose more than {drop:g} point(s) at every ratio."
        )
        sentences.append(Sentence("doubt", text))
    if tough:
        text = f"{len(tough)} of {len(groups)} groups alone lose at most {drop:g} point(s) at the ratio {least:g}."
        sentences.append(Sentence("good", text))
    return sentences


def _cards(method: str, body: Mapping[str, Any]) -> list[Card]:
    dense, images = body["dense"]["top1"], body["images"]
    error = standard_error({"": {"top1": dense, "images": images}}, "", "top1")
    note = f"± {error:.2f}, {images:,} images" if error is not None else ""
    return [
        Card("method", method, "nothing finetuned"),
        Card("dense top-1 %", f"{dense:.2f}", note),
        Card("dense loss", f"{body['dense']['loss']:.4f}"),
        Card("groups", str(len(body["groups"])), f"each alone, {len(body['groups'][0]['points'])} ratios"),
        Card("ratios suggested", str(len(body["keep_ratios"])), f"at most {body['max_drop']:g} point(s) lost"),
    ]


def curves_figure(body: Mapping[str, Any]) -> dict[str, Any]:
    """Plot top-1 and loss against the keep ratio, a curve for each group; top-1 of repaired networks is dotted.

    Args:
        body: The body of ratio_curves.json.
    """
    groups, plots = body["groups"], []
    for key, title in (("top1", "top-1 %"), ("loss", "cross-entropy")):
        dense, lines = body["dense"][key], []
        for rank, group in reversed(list(enumerate(groups))):
            series = rank if rank < NAMED else None
            points = [(1.0, dense), *((p["ratio"], _number(p[key])) for p in group["points"])]
            lines.append(Line(points, group["group"], series, marked=series is not None))
            if key == "top1" and series is not None and group["points"][0].get("repaired") is not None:
                repaired = [(1.0, dense), *((p["ratio"], p["repaired"]) for p in group["points"])]
                lines.append(Line(repaired, f"{group['group']}, repaired", series, "dashed"))
        x = "share of the group's channels kept"
        plots.append(Plot(x, title, lines=lines, levels=[(dense, f"dense: {dense:.4g}")], falling=True))
    names: list[tuple[int | None, str]] = [(rank, group["group"]) for rank, group in enumerate(groups[:NAMED])]
    if len(groups) > NAMED:
        names.append((None, f"{len(groups) - NAMED} less sensitive groups"))
    return figure("", plots, names)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _rows(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table: each cell with its share of the largest loss of top-1."""
    dense, groups = body["dense"]["top1"], body["groups"]
    largest = max(1.0, *(dense - point["top1"] for group in groups for point in group["points"]))
    return [
        {
            "group": group["group"],
            "width": group["width"],
            "cells": [
                (point, max(0.0, (dense - point["top1"]) / largest), dense - point["top1"]) for point in group["points"]
            ],
            "suggested": body["keep_ratios"].get(group["group"]),
        }
        for group in groups
    ]

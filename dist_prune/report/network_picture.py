"""The network as a picture: a column for each layer, higher with more output channels, its area the MACs.

    dense   height = sqrt(output channels), width = MACs / height
    pruned  the same of what is left, drawn into the column from its lower left corner

The root lets one see layers of 64 channels beside those of 2,048. Arcs below the columns tie layers whose channels are
removed together.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

WIDTH, HEIGHT, BELOW = 1000.0, 200.0, 46.0  # of the drawing: columns, and arcs below them
THIN = 0.6  # width of the columns that would be thinner


def layers_of(widths: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The layers of report.json, or none: reports of earlier versions do not have them."""
    return list(widths.get("network") or [])


def picture(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Lay out the columns and arcs.

    Args:
        layers: ``network`` of report.json: ``name``, ``group`` (may be empty), ``out`` and ``macs``, each of the
            dense and of the pruned network.

    Returns:
        ``width``, ``height``, ``columns`` and ``ties`` for the template; None without a layer that has MACs.
    """
    drawn = [layer for layer in layers if layer["macs"][0] and layer["out"][0]]
    if not drawn:
        return None
    highest = max(layer["out"][0] for layer in drawn)
    each = [layer["macs"][0] / layer["out"][0] ** 0.5 for layer in drawn]
    gap = min(2.0, 0.2 * WIDTH / len(drawn))
    scale = (WIDTH - gap * len(drawn)) / sum(each)
    columns, x = [], 0.0
    for layer, width in zip(drawn, each, strict=True):
        (dense, left), (before, after) = layer["macs"], layer["out"]
        wide, high = max(THIN, width * scale), HEIGHT * (before / highest) ** 0.5
        inner = max(THIN, left / after**0.5 * scale) if after else 0.0
        low = high * (after / before) ** 0.5
        columns.append(
            {
                "x": x, "width": wide, "y": HEIGHT - high, "height": high,
                "inner_width": min(inner, wide), "inner_height": low,
                "inner_y": HEIGHT - low, "base": HEIGHT,
                "whole": after == before and left == dense, "group": layer["group"],
                "title": f"{layer['name']}: {before} → {after} channels, "
                f"{dense / 1e6:,.2f} → {left / 1e6:,.2f} million MACs"
                + (f"; group {layer['group']}" if layer["group"] else ""),
            }
        )  # fmt: skip
        x += wide + gap
    shrink = WIDTH / max(x - gap, 1e-9)  # thin columns were widened
    for column in columns:
        for key in ("x", "width", "inner_width"):
            column[key] *= shrink
    return {"width": WIDTH, "height": HEIGHT + BELOW, "columns": columns, "ties": _ties(columns), "highest": highest}


def _ties(columns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An arc between each two neighbouring layers of a group."""
    places: dict[str, list[float]] = {}
    for column in columns:
        if column["group"]:
            places.setdefault(column["group"], []).append(column["x"] + column["width"] / 2)
    tied = {group: xs for group, xs in places.items() if len(xs) > 1}
    ties = []
    for number, (group, xs) in enumerate(tied.items()):
        base, depth = HEIGHT + 3, (BELOW - 8) * (0.55 + 0.45 * (number % 3) / 2)
        d = "".join(
            f"M{a:.1f} {base:g}C{a:.1f} {base + depth:.1f} {b:.1f} {base + depth:.1f} {b:.1f} {base:g}"
            for a, b in pairwise(xs)
        )
        ties.append(
            {"d": d, "css": f"c{number % 8}", "title": f"{len(xs)} layers lose the same channels: group {group}"}
        )
    return ties


def layer_rows(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the table of layers: name, kind, group, widths, MACs in millions, the share of them that is left."""
    return [
        {
            "name": layer["name"], "kind": layer["kind"], "group": layer["group"],
            "in": _change(layer["in"]), "out": _change(layer["out"]),
            "kept": layer["out"][1] / layer["out"][0] if layer["out"][0] else 1.0,
            "before": layer["macs"][0] / 1e6, "after": layer["macs"][1] / 1e6,
            "left": layer["macs"][1] / layer["macs"][0] if layer["macs"][0] else 1.0,
        }
        for layer in layers
    ]  # fmt: skip


def _change(pair: Sequence[int]) -> str:
    before, after = pair
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def left_alone(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Why nothing was cut from some groups: (reason, names of the groups), the most frequent reason first."""
    reasons: dict[str, list[str]] = {}
    for group in groups:
        if group["reason"]:
            reasons.setdefault(group["reason"], []).append(group["name"])
    return sorted(reasons.items(), key=lambda item: -len(item[1]))

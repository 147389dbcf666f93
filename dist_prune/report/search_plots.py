"""Plots of a search for each group's ratio: its candidates and their front."""

from collections.abc import Mapping
from typing import Any

from dist_prune.report.plots import Line, Mark, Plot, figure

ORIGINS = ("drawn", "varied", "crossed")  # how most candidates came about; the others have names of their own
START = 3  # series of the others


def search_figures(search: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Plot the candidates that a search judged, and their front.

    Args:
        search: ``search`` of report.json; without candidates: no plots.
    """
    if not search.get("lines"):
        return []
    judged = [line for line in search["lines"] if line["figure"] is not None]
    marks = [
        Mark(
            100 * line["share"],
            line["figure"],
            f"candidate {line['number']} ({line['origin']}): {search['figure']} {line['figure']:.4g}, "
            f"{line['share']:.1%} of the {search['cost']}",
            _series(line["origin"]),
        )
        for line in judged
    ]
    front = [(100 * line["share"], line["figure"]) for line in search["front"] if line["figure"] is not None]
    plot = Plot(f"{search['cost']} left, %", search["figure"], lines=[Line(front, "front", START + 1)], marks=marks)
    names: list[tuple[int | None, str]] = [(k, origin) for k, origin in enumerate(ORIGINS)]
    others = sorted({line["origin"] for line in judged} - {*ORIGINS})
    names += [(START, ", ".join(others))] if others else []
    return [figure("Candidates and their front", [plot], [*names, (None, "line: the front")])]


def _series(origin: str) -> int:
    return ORIGINS.index(origin) if origin in ORIGINS else START

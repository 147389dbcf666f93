"""Tables of compared criteria: figures and costs of each, and the channels that each two keep in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_prune.pruning.selection.cost import report_costs
from dist_prune.report.cut_speed import speed_text
from dist_prune.report.tables import standard_error, task_of
from dist_prune.tasks.primary import PrimaryFigure


def table_of_report(body: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """The table of compared criteria: the primary figure after pruning, and repaired, and the costs that are left.

    Args:
        body: The body of report.json.

    Returns:
        Column heads, and rows of cells; None if there are no lines.
    """
    lines = body.get("many", [])
    if not lines:
        return None
    first = str(body.get("many_images", "")).partition(" ")[0]
    return criteria_table(lines, task_of(body), int(first) if first.isdigit() else 0)


def criteria_table(
    lines: Sequence[Mapping[str, Any]], task: Mapping[str, Any], images: int
) -> tuple[list[str], list[list[str]]]:
    """The table of compared criteria.

    Args:
        lines: ``table`` of criteria.json; at least one.
        task: What the report says of the task.
        images: Number of images that the figure was measured on; 0 if it is not known.

    Returns:
        Column heads, and rows of cells.
    """
    figure = PrimaryFigure.of(task)
    primary, costs = figure.key, [cost for cost in report_costs() if cost.name in lines[0]]
    keys = [primary, *(["repaired"] if "repaired" in lines[0] else [])]
    rows, timed = [], any("ms" in line for line in lines)
    for line in lines:
        figures = []
        for key in keys:
            error = standard_error({"": {primary: line[key], "images": images}}, "", primary)
            figures.append(figure.number(line[key]) + (f" ± {error:.2f}" if error is not None else ""))
        shares = [f"{line[cost.name]:.1%}" for cost in costs]
        rows.append([line["method"], *figures, *shares, *([speed_text(line)] if timed else [])])
    return [
        "criterion",
        figure.title,
        *(["repaired"] if len(keys) > 1 else []),
        *(f"{cost.title} left" for cost in costs),
        *(["speed-up"] if timed else []),
    ], rows


def criteria_overlap(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, list[float]]]]:
    """What each two criteria keep in common: names, and for each criterion its name and shares in their order.

    Args:
        lines: ``table`` of criteria.json.
    """
    names = [line["method"] for line in lines]
    return names, [(line["method"], [line["overlap"].get(name, 0.0) for name in names]) for line in lines]

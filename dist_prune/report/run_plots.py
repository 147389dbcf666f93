"""Plots of a run's report: its trainings, its information curves, the method's curves, calibration."""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_prune.pruning.figure_data import Curve
from dist_prune.report.plots import Line, Plot, figure
from dist_prune.report.tables import loss_title
from dist_prune.tasks.primary import PrimaryFigure

_PLANE = {
    "ixz": "I(X;Z), bits",
    "izy": "I(Z;Y), bits",
    "total_correlation": "total correlation, bits",
}
NAMED = 16  # most curves of a plot that a legend names


def training_figures(
    histories: Mapping[str, Sequence[Mapping[str, float]]], task: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Plot the loss and the primary figure of each training over its epochs.

    Args:
        histories: Name of a training -> its history: ``epoch`` and ``loss``, and ``<split>_<primary>`` and
            ``<split>_loss`` for the epochs that were evaluated.
        task: What the report says of the task.
    """
    primary = task["primary"]
    return [_training(name, lines, primary, task["titles"][primary]) for name, lines in histories.items() if lines]


def _training(name: str, lines: Sequence[Mapping[str, float]], primary: str, title: str) -> dict[str, Any]:
    ending = f"_{primary}"
    split = next((k.removesuffix(ending) for line in lines for k in line if k.endswith(ending)), "test")
    tested = [line for line in lines if split + ending in line]

    def points(key: str, of: Sequence[Mapping[str, float]]) -> list[tuple[float, float]]:
        return [(line["epoch"], _number(line.get(key))) for line in of]

    loss = loss_title(primary)
    own = Line(points("loss", lines), f"{loss} of the training images", 0, marked=True)
    of_split = Line(points(f"{split}_loss", tested), f"{loss} of the {split} images", 1, marked=True)
    figure_line = Line(points(split + ending, tested), f"{split} {title}", 1, marked=True)
    if not tested:  # no epoch was evaluated
        return figure(f"Training: {name}", [Plot("epoch", loss, lines=[own], integers=True)], [(0, "training images")])
    plots = [
        Plot("epoch", loss, lines=[own, of_split], integers=True),
        Plot("epoch", f"{split} {title}", lines=[figure_line], integers=True),
    ]
    return figure(f"Training: {name}", plots, [(0, "training images"), (1, f"{split} images")])


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def method_figures(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Plot the method's curves, one plot for each pair of axis titles."""
    out = []
    for axes in dict.fromkeys(curve.axes for curve in curves):
        same = [curve for curve in curves if curve.axes == axes]
        few = len(same) <= NAMED
        lines = [
            Line(list(zip(curve.x, curve.y, strict=True)), curve.group, k if few else k % 8, marked=few)
            for k, curve in enumerate(same)
        ]
        names = [(k, curve.group) for k, curve in enumerate(same)] if few else []
        out.append(figure(axes[1], [Plot(axes[0], axes[1], lines=lines)], names))
    return out


def plane_figures(rows: Sequence[Mapping[str, str]], task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Plot the primary figure and information against the share of kept filters, a curve for each group.

    Args:
        rows: The lines of curves.csv; none: no plots.
        task: What the report says of the task.
    """
    if not rows:
        return []
    primary = PrimaryFigure.of(task)
    titles = {primary.key: primary.axis_title, **_PLANE}
    groups = list(dict.fromkeys(row["group"] for row in rows))
    plots = []
    for key in (key for key in titles if any(row[key] for row in rows)):
        lines = []
        for number, group in enumerate(groups):
            own = [row for row in rows if row["group"] == group and row[key]]
            points = [(int(row["kept"]) / int(row["width"]), float(row[key])) for row in own]
            lines.append(Line(points, group, number, marked=True))
        plots.append(Plot("share of the filters kept", titles[key], lines=lines))
    title = "Every number of kept filters, one group at a time, not finetuned"
    return [figure(title, plots, list(enumerate(groups)) if len(groups) <= NAMED else [])]


def calibration_figure(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Plot accuracy against confidence for each network (a reliability diagram).

    Args:
        found: ``calibration`` of report.json; empty: no plot.
    """
    if not found:
        return []
    lines = [Line([(0, 0), (100, 100)], "confidence equals accuracy", None)]
    for number, (name, measured) in enumerate(found.items()):
        bins = [(one["confidence"], one["accuracy"]) for one in measured["bins"]]
        lines.append(Line(bins, f"{name}: accuracy at confidence", number, marked=True))
    names = [(k, f"{name}: calibration error {one['ece']:.2f} %") for k, (name, one) in enumerate(found.items())]
    return [figure("", [Plot("confidence %", "accuracy %", lines=lines)], [*names, (None, "perfect")])]

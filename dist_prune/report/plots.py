"""Plots of pages as data: curves and marks in the units of their axes, laid out as paths for the template.

A plot is small, and pages put several side by side, so that its text is as readable on a telephone as on a wide screen.
A series has a colour and a shape of its own: colours alone do not tell series apart for everyone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

WIDTH, HEIGHT = 300, 210  # of a plot, in the pixels of its narrowest display
TOP, RIGHT, BOTTOM = 8, 14, 24
LETTER = 7.0  # width of a digit of 12 px, rounded up
RADIUS = 4.5
COLOURS = SHAPES = 8
MARKS = 12  # most marks of a curve, or nearly as many more


@dataclass(frozen=True)
class Mark:
    """A point.

    Attributes:
        x: in the unit of the axis.
        y: in the unit of the axis.
        title: what a pointer that rests on it reads.
        series: number of its colour and shape.
        hollow: whether only its outline is drawn: its place is in doubt.
        error: half the length of its error bar, in the unit of the y axis; 0 for none.
        data: attributes by which the page's script filters, without ``data-``; ``front`` gets the place in the picture.
        hidden: whether it is shown only when the page's script asks for it.
    """

    x: float
    y: float
    title: str
    series: int = 0
    hollow: bool = False
    error: float = 0.0
    data: Mapping[str, str] = field(default_factory=dict)
    hidden: bool = False


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        points: (x, y), in the units of the axes; a value that is not finite interrupts the curve.
        title: what a pointer that rests on it reads.
        series: number of its colour; None: a quiet line among others.
        style: ``curve``, ``dashed``, or ``front`` for a Pareto front that the page's script draws anew.
        marked: whether points have the series' mark; of a long curve some have.
        data: attributes, as of ``Mark``.
    """

    points: Sequence[tuple[float, float]]
    title: str
    series: int | None = 0
    style: Literal["curve", "dashed", "front"] = "curve"
    marked: bool = False
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plot:
    """One pair of axes.

    Attributes:
        x_title: name and unit of the x axis.
        y_title: name and unit of the y axis.
        title: caption; empty for none.
        lines: curves.
        marks: points, drawn above the curves.
        levels: (y, title) of horizontal lines.
        falling: whether x falls from left to right.
        integers: whether only whole numbers of x are labelled.
        better: the side on which x is better, for fronts.
        lower: whether low values of y are better, for fronts.
    """

    x_title: str
    y_title: str
    title: str = ""
    lines: Sequence[Line] = ()
    marks: Sequence[Mark] = ()
    levels: Sequence[tuple[float, str]] = ()
    falling: bool = False
    integers: bool = False
    better: Literal["left", "right"] = "left"
    lower: bool = False


def figure(
    title: str, plots: Iterable[Plot], names: Iterable[tuple[int | None, str]] = (), kind: str = "mark"
) -> dict[str, Any]:
    """Plots below one title and one legend, for the template.

    Args:
        title: Headline; empty for none.
        plots: The plots.
        names: (series, name) of the legend.
        kind: ``mark`` or ``curve``: what the legend shows.
    """
    return {"title": title, "panels": [layout(plot) for plot in plots], "legend": legend(names, kind)}


def legend(names: Iterable[tuple[int | None, str]], kind: str = "mark") -> list[dict[str, str]]:
    """Entries of a legend: css class, name, kind and path of the sign."""
    return [
        {
            "css": colour(series),
            "name": name,
            "kind": "mark" if kind == "mark" and series is not None else "curve",
            "d": shape(series, 8, 8, 6) if kind == "mark" and series is not None else "M0 8L16 8",
        }
        for series, name in names
    ]


def colour(series: int | None) -> str:
    """The css class of a series' colour."""
    return "quiet" if series is None else f"c{series % COLOURS}"


def shape(series: int, x: float, y: float, radius: float = RADIUS) -> str:
    """The path of a series' mark; from the ninth series on, colours meet other shapes."""
    number, r = (series + series // COLOURS) % SHAPES, radius
    if number == 0:
        return f"M{x - r:.1f} {y:.1f}a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0z"
    a, b, star = 0.85 * r, 0.4 * r, (1.3 * r, 0.55 * r)
    corners: dict[int, list[tuple[float, float]]] = {
        1: [(-a, -a), (a, -a), (a, a), (-a, a)],
        2: [(0, -1.1 * r), (r, a), (-r, a)],
        3: [(0, -1.2 * r), (1.2 * r, 0), (0, 1.2 * r), (-1.2 * r, 0)],
        4: [(0, 1.1 * r), (r, -a), (-r, -a)],
        5: [(-b, -r), (b, -r), (b, -b), (r, -b), (r, b), (b, b), (b, r), (-b, r), (-b, b), (-r, b), (-r, -b), (-b, -b)],
        6: [(-r, -b), (-b, -r), (b, -r), (r, -b), (r, b), (b, r), (-b, r), (-r, b)],
        7: [(math.sin(k * math.pi / 5) * star[k % 2], -math.cos(k * math.pi / 5) * star[k % 2]) for k in range(10)],
    }  # fmt: skip
    return "M" + "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in corners[number]) + "z"


def ticks(low: float, high: float, count: int = 4, integers: bool = False) -> list[tuple[float, str]]:
    """Round values between two bounds, with their labels.

    Args:
        low: Lower bound.
        high: Upper bound, above ``low``.
        count: About how many; one or two more may fit.
        integers: Whether they must be whole numbers.
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.8 * raw)
    if integers:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) + (
        abs(step / 10 ** math.floor(math.log10(step)) - 2.5) < 1e-9
    )
    digits = 0 if step >= 10 or step == int(step) else digits
    return [(k * step, f"{k * step + 0.0:,.{digits}f}") for k in range(first, last + 1)]


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis: that of its values with a margin, never empty."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def layout(plot: Plot) -> dict[str, Any]:
    """The paths, labels and titles of a plot, in pixels."""
    points = [(x, y) for line in plot.lines for x, y in line.points] + [(mark.x, mark.y) for mark in plot.marks]
    ends = [mark.y + side * mark.error for mark in plot.marks for side in (-1, 1)]
    levels = [(y, title) for y, title in plot.levels if math.isfinite(y)]
    xs = _bounds([x for x, y in points if math.isfinite(x) and math.isfinite(y)])
    ys = _bounds(
        [y for y in [*(y for x, y in points if math.isfinite(x)), *ends, *(y for y, _ in levels)] if math.isfinite(y)]
    )
    x_ticks, y_ticks = ticks(*xs, integers=plot.integers), ticks(*ys)
    left = 8 + LETTER * max((len(label) for _, label in y_ticks), default=1)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        share = (x - xs[0]) / (xs[1] - xs[0])
        share = 1 - share if plot.falling else share
        return left + share * (right - left), bottom - (y - ys[0]) / (ys[1] - ys[0]) * (bottom - TOP)

    rows = [place(xs[0], y)[1] for y, _ in y_ticks]
    columns = [place(x, ys[0])[0] for x, _ in x_ticks]
    return {
        "title": plot.title, "x_title": plot.x_title, "y_title": plot.y_title, "width": WIDTH, "height": HEIGHT,
        "better": plot.better, "lower": plot.lower,
        "grid": "".join(f"M{left:.1f} {y:.1f}H{right:.1f}" for y in rows),
        "axis": f"M{left:.1f} {bottom}H{right:.1f}" + "".join(f"M{x:.1f} {bottom}v4" for x in columns),
        "x_labels": [
            (f"{min(x, WIDTH - LETTER * len(label) / 2):.1f}", f"{bottom + 17:.1f}", label)
            for x, (_, label) in _apart(list(zip(columns, x_ticks, strict=True)))
        ],
        "y_labels": [(f"{left - 5:.1f}", f"{y + 4:.1f}", label) for y, (_, label) in zip(rows, y_ticks, strict=True)],
        "levels": [{"d": f"M{left:.1f} {place(xs[0], y)[1]:.1f}H{right:.1f}", "title": title} for y, title in levels],
        "lines": [_line(line, place) for line in plot.lines],
        "marks": [_mark(mark, place) for mark in (*_of_lines(plot.lines), *plot.marks) if _finite(mark)],
    }  # fmt: skip


def _apart(labelled: list[tuple[float, tuple[float, str]]]) -> list[tuple[float, tuple[float, str]]]:
    """The labels of an axis, without those that would touch the one before."""
    kept: list[tuple[float, tuple[float, str]]] = []
    for x, tick in sorted(labelled):
        if not kept or x - kept[-1][0] > LETTER * (len(tick[1]) + len(kept[-1][1][1])) / 2 + 6:
            kept.append((x, tick))
    return kept


def _finite(mark: Mark) -> bool:
    return math.isfinite(mark.x) and math.isfinite(mark.y)


def _of_lines(lines: Sequence[Line]) -> list[Mark]:
    return [
        Mark(x, y, f"{line.title}: {y:.5g} at {x:.5g}", line.series or 0)
        for line in lines
        if line.marked and line.series is not None
        for x, y in line.points[:: -max(1, len(line.points) // MARKS)]  # the last point has one
    ]


def _line(line: Line, place: Any) -> dict[str, Any]:
    steps, pen = [], "M"
    for x, y in line.points:
        if math.isfinite(x) and math.isfinite(y):
            steps.append(pen + " ".join(f"{value:.1f}" for value in place(x, y)))
        pen = "L" if math.isfinite(x) and math.isfinite(y) else "M"
    kind = "front" if line.style == "front" else "curve dashed" if line.style == "dashed" else "curve"
    return {"d": "".join(steps), "css": f"{kind} {colour(line.series)}", "title": line.title, "data": line.data}


def _mark(mark: Mark, place: Any) -> dict[str, Any]:
    x, y = place(mark.x, mark.y)
    bar = ""
    if mark.error and math.isfinite(mark.error):
        high, low = place(mark.x, mark.y + mark.error)[1], place(mark.x, mark.y - mark.error)[1]
        bar = f"M{x:.1f} {high:.1f}V{low:.1f}M{x - 3:.1f} {high:.1f}h6M{x - 3:.1f} {low:.1f}h6"
    data = {key: f"{x:.1f} {y:.1f}" if key == "front" else value for key, value in mark.data.items()}
    drawn = {"css": colour(mark.series), "d": shape(mark.series, x, y), "hollow": mark.hollow, "title": mark.title}
    return {**drawn, "error": bar, "data": data, "hidden": mark.hidden}


def pareto(
    points: Iterable[tuple[float, float]], better: str = "left", higher_is_better: bool = True
) -> list[tuple[float, float]]:
    """The points that no point of lower cost beats, by rising cost.

    Args:
        points: (cost, figure).
        better: ``left`` if low costs are better, ``right`` if high ones are (a speed-up).
        higher_is_better: Whether high figures are better; an error is better where it is low.
    """
    sign, up, best, front = 1 if better == "left" else -1, 1 if higher_is_better else -1, float("-inf"), []
    for x, y in sorted(points, key=lambda point: (sign * point[0], -up * point[1])):
        if up * y > best:
            best = up * y
            front.append((x, y))
    return front

"""Plots of pages: round ticks, places that a reader can check, signs that differ by more than their colour."""

import math
from itertools import pairwise

import numpy as np
import pytest

from dist_prune.report import plots
from dist_prune.report.plots import Line, Mark, Plot


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 10, ["0", "2", "4", "6", "8", "10"]),
        (0.1, 0.93, ["0.2", "0.4", "0.6", "0.8"]),
        (88.2, 91.9, ["89", "90", "91"]),
        (900, 4100, ["1,000", "2,000", "3,000", "4,000"]),
        (-0.02, 0.021, ["-0.02", "-0.01", "0.00", "0.01", "0.02"]),
    ],
)
def test_ticks_are_round(low, high, labels):
    assert [label for _, label in plots.ticks(low, high)] == labels


def test_ticks_lie_between_their_bounds_and_say_what_they_are():
    rng = np.random.default_rng(0)
    for _ in range(300):
        low = float(rng.normal() * 10 ** rng.uniform(-4, 6))
        high = low + float(10 ** rng.uniform(-3, 6))
        found = plots.ticks(low, high)
        assert 2 <= len(found) <= 6
        assert len({label for _, label in found}) == len(found)
        step = found[1][0] - found[0][0]
        for value, label in found:
            assert low - 1e-6 * step <= value <= high + 1e-6 * step
            assert float(label.replace(",", "")) == pytest.approx(value, abs=step * 1e-3)


def test_epochs_are_whole_numbers():
    assert [label for _, label in plots.ticks(0.9, 2.1, integers=True)] == ["1", "2"]


def test_each_series_has_a_sign_of_its_own():
    signs = [(plots.colour(k), plots.shape(k, 0, 0)) for k in range(64)]
    assert len(set(signs)) == 64
    assert len({shape for _, shape in signs[:8]}) == 8, "eight series differ in shape, whatever colours one sees"
    assert plots.shape(0, 10, 10) != plots.shape(0, 20, 10)


def place(mark: dict) -> tuple[float, float]:
    x, y = mark["d"][1:].split("a")[0].split(" ")
    return float(x) + plots.RADIUS, float(y)


def test_marks_stand_where_the_axes_say():
    marks = [Mark(x, y, f"{x}, {y}") for x, y in ((0, 0), (1, 10), (2, 20))]
    drawn = plots.layout(Plot("x", "y", marks=marks, levels=[(10, "middle")]))
    (x0, y0), (x1, y1), (x2, y2) = map(place, drawn["marks"])
    assert x0 < x1 < x2 and y0 > y1 > y2, "larger values are to the right and up"
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    ticks = {label: float(x) for x, _, label in drawn["x_labels"]}
    assert ticks["1.0"] == pytest.approx(x1, abs=0.2)
    assert float(drawn["levels"][0]["d"].split(" ")[1].split("H")[0]) == pytest.approx(y1, abs=0.2)
    falling = [place(mark)[0] for mark in plots.layout(Plot("x", "y", marks=marks, falling=True))["marks"]]
    assert falling == sorted(falling, reverse=True)


def test_labels_stay_in_the_picture_and_apart():
    rng = np.random.default_rng(1)
    for _ in range(200):
        xs = rng.normal(size=5) * 10 ** rng.uniform(-3, 6)
        ys = rng.normal(size=5) * 10 ** rng.uniform(-3, 6)
        drawn = plots.layout(Plot("x", "y", lines=[Line(list(zip(xs, ys, strict=True)), "line")]))
        ends = [(float(x), plots.LETTER * len(label) / 2) for x, _, label in drawn["x_labels"]]
        assert all(x - half >= 0 and x + half <= plots.WIDTH + 0.1 for x, half in ends)
        assert all(a + p < b - q for (a, p), (b, q) in pairwise(ends))
        assert all(float(x) - plots.LETTER * len(label) >= 0 for x, _, label in drawn["y_labels"])


def test_a_value_that_is_not_finite_interrupts_its_curve():
    line = Line([(0, 1), (1, math.nan), (2, 3), (3, 4)], "loss", marked=True)
    drawn = plots.layout(Plot("x", "y", lines=[line]))
    assert drawn["lines"][0]["d"].count("M") == 2 and drawn["lines"][0]["d"].count("L") == 1
    assert len(drawn["marks"]) == 3
    assert "nan" not in str(drawn)


def test_a_long_curve_has_some_marks_and_one_at_its_end():
    for count in (1, 5, 12, 13, 100, 301):
        points = [(float(x), float(x)) for x in range(count)]
        marks = plots.layout(Plot("x", "y", lines=[Line(points, "loss", marked=True)]))["marks"]
        assert min(count, plots.MARKS) <= len(marks) < 2 * plots.MARKS
        assert f": {count - 1} at" in marks[0]["title"]


def test_a_plot_of_one_point_and_of_none_has_axes():
    for marks in ([], [Mark(5, 5, "alone")]):
        drawn = plots.layout(Plot("x", "y", marks=marks))
        assert len(drawn["x_labels"]) >= 2 and len(drawn["marks"]) == len(marks)


def test_error_bars_are_in_the_unit_of_the_axis():
    (mark,) = plots.layout(Plot("x", "y", marks=[Mark(0, 0, "m", error=2)], levels=[(2, "up"), (-2, "down")]))["marks"]
    levels = plots.layout(Plot("x", "y", marks=[Mark(0, 0, "m", error=2)], levels=[(2, "up"), (-2, "down")]))["levels"]
    high, low = (float(level["d"].split(" ")[1].split("H")[0]) for level in levels)
    assert f"{high:.1f}V{low:.1f}" in mark["error"]


def test_the_front_leaves_out_what_a_cheaper_point_beats():
    points = [(1, 80), (2, 79), (3, 85), (3, 84), (4, 90)]
    assert plots.pareto(points) == [(1, 80), (3, 85), (4, 90)]
    assert plots.pareto(points, "right") == [(4, 90)]
    assert plots.pareto([(2, 70), (1, 75)], "right") == [(2, 70), (1, 75)]
    assert plots.pareto([]) == []

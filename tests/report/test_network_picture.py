"""The network as a picture: areas are MACs, heights are roots of channels, arcs tie what goes together."""

import pytest

from dist_prune.pruning.selection import cost
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.report import network_picture
from dist_prune.stages.report import network_lines
from tests.support import tiny


@pytest.fixture(scope="module")
def graph():
    return trace_groups(tiny.network(), tiny.example())


def kept_of(graph) -> dict[str, int]:
    return {group.name: group.width // 2 for group in graph.free}


def test_the_macs_of_layers_add_up(graph):
    for kept in ({}, kept_of(graph)):
        assert sum(cost.layer_macs(graph, kept).values()) == cost.macs(graph, kept)


def test_areas_are_macs_and_heights_are_roots_of_channels(graph):
    layers = network_lines(graph, kept_of(graph))
    drawn = network_picture.picture(layers)
    assert drawn is not None
    columns = [column for column in drawn["columns"] if column["width"] > 2 * network_picture.THIN]
    assert len(columns) >= 3
    by_title = {layer["name"]: layer for layer in layers}
    scales = set()
    for column in columns:
        layer = by_title[column["title"].split(":")[0]]
        area, inner = column["width"] * column["height"], column["inner_width"] * column["inner_height"]
        scales.add(round(layer["macs"][0] / area, 3))
        assert inner / area == pytest.approx(layer["macs"][1] / layer["macs"][0], rel=1e-6)
        assert (column["inner_height"] / column["height"]) ** 2 == pytest.approx(layer["out"][1] / layer["out"][0])
        assert column["inner_width"] <= column["width"]
    assert max(scales) == pytest.approx(min(scales), rel=1e-3), "one area for one multiplication"
    last = drawn["columns"][-1]
    assert last["x"] + last["width"] <= network_picture.WIDTH * 1.001


def test_arcs_tie_the_layers_of_a_group(graph):
    layers = network_lines(graph, {})
    tied = {}
    for layer in layers:
        tied.setdefault(layer["group"], []).append(layer["name"])
    several = {group for group, names in tied.items() if group and len(names) > 1}
    drawn = network_picture.picture(layers)
    assert drawn is not None and several
    assert {tie["title"].split("group ")[1] for tie in drawn["ties"]} == several
    assert all(column["whole"] for column in drawn["columns"])


def test_a_report_of_before_has_no_picture():
    assert network_picture.layers_of({"plan": {}}) == []
    assert network_picture.picture([]) is None


def test_reasons_are_counted_once():
    groups = [{"name": n, "reason": why} for n, why in (("a", "x"), ("b", ""), ("c", "y"), ("d", "y"))]
    assert network_picture.left_alone(groups) == [("y", ["c", "d"]), ("x", ["a"])]

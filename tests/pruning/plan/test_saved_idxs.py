"""Pruning information in the graph authors' form: there and back, by name and in order, and what does not fit."""

import json

import pytest
import torch

from dist_prune import models
from dist_prune.errors import PruneError
from dist_prune.methods.graph.method import Graph, Options
from dist_prune.pruning.plan import files
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.saved_idxs import from_saved_idxs, to_saved_idxs
from dist_prune.pruning.selection import plan_summary
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support import tiny

CHANNELS = Graph(Options()).prunable(trace_groups(tiny.network(), tiny.example()[:1]))
PLAN = Plan.from_kept(CHANNELS, {"conv1": [0, 3, 5], "layer2.0.conv1": list(range(31)), "layer3.0.downsample.0": [63]})


def test_there_and_back():
    body = json.loads(json.dumps(to_saved_idxs(PLAN, CHANNELS)))
    assert list(body) == [
        "conv1", "layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0", "layer3.0.conv1", "layer3.0.downsample.0",
    ]  # fmt: skip
    assert body["conv1"] == {"saved_idxs": [0, 3, 5], "mask_num": 13}
    assert body["layer1.0.conv1"]["mask_num"] == 0
    assert from_saved_idxs(body, CHANNELS).canonical() == PLAN.canonical()


def test_other_names_are_taken_in_the_order_of_the_scored_layers():
    """The authors' modules have other names; they rebuild their networks by position."""
    body = {f"theirs_{i}": entry for i, entry in enumerate(to_saved_idxs(PLAN, CHANNELS).values())}
    assert from_saved_idxs(body, CHANNELS).canonical() == PLAN.canonical()


def test_the_authors_names_of_resnet50_are_timm_s():
    """conv3 follows its stage's projection; a whole file of theirs names exactly the scored layers."""
    channels = trace_groups(models.create("resnet50", 10, 3).eval(), torch.randn(1, 3, 64, 64))
    names = ["conv1"]
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            names += [f"layer{stage}.{block}.conv{n}" for n in (1, 2)]
            names += [f"layer{stage}.0.downsample.0"] * (block == 0)
    width = {group.name: group.width for group in channels.groups}
    body = {name: {"saved_idxs": list(range(0, width[name], 2)), "mask_num": width[name] // 2} for name in names}
    plan = from_saved_idxs(body, Graph(Options()).prunable(channels))
    assert set(plan.removed) == set(names)
    assert list(to_saved_idxs(plan, Graph(Options()).prunable(channels))) == names


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda body: body.update({"layer1.0.conv2": body.pop("conv1")}), "It follows 'conv1'"),
        (lambda body: body.update({"layer1.0.conv9": body.pop("layer1.0.conv1")}), "Did you mean 'layer1.0.conv1'"),
        (lambda body: body["conv1"]["saved_idxs"].append(16), "do not fit a layer of 16"),
        (lambda body: body["conv1"]["saved_idxs"].append(0), "doubled"),
        (lambda body: body["conv1"].update(mask_num=12), "3 saved and 12 removed filters do not fit"),
        (lambda body: body["conv1"].update(saved_idxs=[], mask_num=16), "do not fit"),
        (lambda body: body["conv1"].pop("mask_num"), "an entry is"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    body = to_saved_idxs(PLAN, CHANNELS)
    change(body)
    with pytest.raises(PruneError, match=said):
        from_saved_idxs(body, CHANNELS)


def test_a_file_may_hold_either_form(tmp_path):
    file = tmp_path / "any.json"
    for text in (PLAN.to_json(), json.dumps(to_saved_idxs(PLAN, CHANNELS))):
        file.write_text(text)
        assert files.read_plan(file, CHANNELS).canonical() == PLAN.canonical()
    body = plan_summary.summarize_plan(PLAN, CHANNELS)
    assert body["groups"]["conv1"] == {"width": 16, "kept": 3}
    assert 0 < body["removed"]["macs"] < 1
    other = trace_groups(tiny.network(name="resnet14p_cifar"), tiny.example()[:1])
    file.write_text(PLAN.to_json())
    with pytest.raises(PruneError, match="a plan for another network"):
        files.read_plan(file, other)
    for text, said in (("[]", "neither a plan nor"), ("{", "is no JSON")):
        file.write_text(text)
        with pytest.raises(PruneError, match=said):
            files.read_plan(file, CHANNELS)
    with pytest.raises(PruneError, match="there is no plan file"):
        files.read_plan(tmp_path / "nowhere.json", CHANNELS)

"""Pruning information in the graph authors' form: there and back, by name and in order, and what does not fit."""

import json

import pytest
import torch

from dist_prune import models
from dist_prune.errors import PruneError
from dist_prune.methods.graph.method import Graph, Options
from dist_prune.models.authors_names import NETWORKS
from dist_prune.pruning.plan import files
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.saved_idxs import from_saved_idxs, to_saved_idxs
from dist_prune.pruning.selection import plan_summary
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support import authors_networks, tiny

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


def _with_names(theirs: dict[str, str]) -> dict[str, dict]:
    return {theirs.get(name, name): entry for name, entry in to_saved_idxs(PLAN, CHANNELS).items()}


def test_one_name_of_many_is_matched_by_its_place_and_shown():
    """The authors' ResNets name the stem ``conv``; all other names are the same."""
    said: list[str] = []
    plan = from_saved_idxs(_with_names({"conv1": "conv"}), CHANNELS, said.append)
    assert plan.canonical() == PLAN.canonical()
    assert said == [
        "pruning information: 5 of 6 layers have the network's names; matched by suffix or order: conv -> conv1"
    ]


def test_names_that_end_alike_are_matched_whatever_their_order():
    body = _with_names({name: f"module.{name}" for name in to_saved_idxs(PLAN, CHANNELS)})
    body = dict(reversed(body.items()))
    assert from_saved_idxs(body, CHANNELS).canonical() == PLAN.canonical()


def test_another_width_in_the_same_place_is_another_network():
    body = _with_names({"conv1": "conv"})
    body["conv"] = {"saved_idxs": [0, 1, 2], "mask_num": 5}
    with pytest.raises(PruneError, match="by order it is 'conv1', which has 16 filters and not 8"):
        from_saved_idxs(body, CHANNELS)


@pytest.mark.parametrize("n", [3, pytest.param(9, marks=pytest.mark.slow)])
def test_pruning_information_of_the_authors_resnets(n):
    """Every name of the authors' file, in its order, and the same names again on the way out."""
    names = authors_networks.GraphResNet(n).scored()
    assert len(names) == 3 * n + 3
    model = models.create(f"resnet{6 * n + 2}p_cifar", 10, 3).eval()
    channels = Graph(Options()).prunable(trace_groups(model, torch.randn(1, 3, 32, 32)))
    width = {group.name: group.width for group in channels.groups}
    body = {}
    for name in names:
        whole = width["conv1" if name == "conv" else name]
        body[name] = {"saved_idxs": list(range(1, whole, 2)), "mask_num": whole // 2}
    plan = from_saved_idxs(body, channels)
    assert len(plan.removed) == len(names)
    assert to_saved_idxs(plan, channels, NETWORKS[f"resnet{6 * n + 2}p_cifar"][0].theirs) == body


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "theirs", "scored"),
    [
        ("vgg16_bn_cifar", authors_networks.GraphVGG, lambda n: True),
        ("googlenet_cifar", authors_networks.GraphGoogLeNet, lambda n: True),
        ("mobilenetv1_cifar", authors_networks.GraphMobileNetV1, lambda n: n == "model.0.0" or n.split(".")[2] == "3"),
        (
            "mobilenetv2_cifar", authors_networks.GraphMobileNetV2,
            lambda n: n == "conv2" or "conv1" in n or "shortcut" in n
            or ("conv3" in n and n.split(".")[1] in ("3", "6", "13")),
        ),
    ],
)  # fmt: skip
def test_the_scored_layers_are_those_of_the_authors_in_their_order(name, theirs, scored):
    """Specification, section 5: so a file of theirs fits by order, and ours has their names with the table."""
    names = [n for n, m in theirs().named_modules() if isinstance(m, torch.nn.Conv2d) and scored(n)]
    channels = Graph(Options()).prunable(trace_groups(models.create(name, 10, 3).eval(), torch.randn(1, 3, 32, 32)))
    body = to_saved_idxs(Plan.from_kept(channels, {}), channels, NETWORKS[name][0].theirs)
    assert list(body) == names
    assert from_saved_idxs(body, channels).empty


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
        (lambda body: body["conv1"].update(saved_idxs=[0.9, 3, 5]), "of whole numbers"),
        (lambda body: body["conv1"].update(saved_idxs=["0", "3", "5"]), "of whole numbers"),
        (lambda body: body["conv1"].update(mask_num=13.7), "of whole numbers"),
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

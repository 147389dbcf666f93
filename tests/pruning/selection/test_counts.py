"""Pruning to given counts: MACs and weights of the published architectures, to the digit; what counts may not say."""

import pytest
import torch

from dist_prune import models
from dist_prune.errors import PruneError
from dist_prune.pruning.selection import cost
from dist_prune.pruning.selection.ranking import SelectionRequest, check_target, explicit_counts, select_by_score
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support import tiny

VGG = {
    "a": (34, 34, 60, 60, 70, 101, 97, 88, 95, 85, 86, 67, 61, 55),
    "b": (39, 39, 63, 48, 55, 98, 97, 52, 62, 22, 42, 47, 47, 42),
    "c": (25, 25, 65, 80, 201, 158, 159, 460, 450, 490, 470, 465, 465, 450),
}
R56 = "layer1.*.conv1", "layer2.*.conv1", "layer3.*.conv1"
INNER = {f"layer{i}.*.conv{j}": n for i, n in enumerate((42, 80, 130, 250), 1) for j in (1, 2)}
OUTER = {f"layer{i}.*.conv3": n for i, n in enumerate((240, 390, 704, 1648), 1)}
WRN = (75, 85, 80, 80, 159, 159, 154, 159, 315, 315, 314, 316)
NETWORKS = {"lenet5_mnist": (1, 28, 10), "vgg16_bn_linear_cifar": (3, 32, 10), "resnet56_cifar": (3, 32, 10),
            "resnet50": (3, 224, 1000), "wrn28_10_cifar": (3, 32, 10)}  # fmt: skip
# network, counts, MACs, weights of convolutions and linear layers (the specification's figures), their units
TABLE = [
    ("lenet5_mnist", {}, 498_750, 40_000, 1, 1),
    ("lenet5_mnist", (8, 9, 36, 17), 236_366, 7_966, 1, 1),
    ("lenet5_mnist", (7, 10, 40, 20), 220_200, 9_325, 1, 1),
    ("lenet5_mnist", (8, 20, 50, 20), 388_400, 21_400, 1, 1),
    ("vgg16_bn_linear_cifar", {}, 31346, 14978, 1e4, 1e3),
    ("vgg16_bn_linear_cifar", VGG["a"], 4094, 635, 1e4, 1e3),
    ("vgg16_bn_linear_cifar", VGG["b"], 3940, 357, 1e4, 1e3),
    ("vgg16_bn_linear_cifar", VGG["c"], 16045, 1143, 1e4, 1e4),
    ("resnet56_cifar", {}, 12549, 849, 1e4, 1e3),
    ("resnet56_cifar", dict(zip(R56, (11, 18, 30), strict=True)), 722, 423, 1e5, 1e3),
    ("resnet56_cifar", dict(zip(R56, (13, 31, 45), strict=True)), 1040, 645, 1e5, 1e3),
    ("resnet50", {}, 4089, 2550, 1e6, 1e4),
    ("resnet50", INNER, 2052, 1241, 1e6, 1e4),
    ("resnet50", INNER | OUTER, 1714, 966, 1e6, 1e4),
    ("wrn28_10_cifar", {}, 5951, 3646, 1e6, 1e4),
    ("wrn28_10_cifar", dict(zip([f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(4)], WRN, strict=True)),
     2966, 1810, 1e6, 1e4),
]  # fmt: skip


@pytest.fixture(scope="module")
def channels():
    found = {}
    for name, (in_chans, side, classes) in NETWORKS.items():
        model = models.create(name, classes, in_chans).eval()
        found[name] = trace_groups(model, torch.rand(1, in_chans, side, side))
    return found


@pytest.mark.parametrize(("name", "counts", "macs", "weights", "mega", "kilo"), TABLE)
def test_macs_and_weights_of_the_published_architectures(name, counts, macs, weights, mega, kilo, channels):
    kept = explicit_counts(channels[name], SelectionRequest(counts=counts)) if counts else {}
    assert round(cost.macs(channels[name], kept) / mega) == macs
    assert round(cost.weights(channels[name], kept) / kilo) == weights


def test_a_cut_network_has_what_the_arithmetic_says(channels):
    model = models.create("lenet5_mnist", 10, 1).eval()
    kept = select_by_score(
        channels["lenet5_mnist"],
        {g.name: torch.rand(g.width) for g in channels["lenet5_mnist"].free},
        SelectionRequest(counts=(8, 9, 36, 17)),
    )
    assert {name: len(stays) for name, stays in kept.items()} == {"conv1": 8, "conv2": 9, "fc1": 36, "fc2": 17}
    from dist_prune.pruning.plan.plan import Plan

    small = tiny.cut(model, channels["lenet5_mnist"], Plan.from_kept(channels["lenet5_mnist"], kept))
    assert sum(p.numel() for n, p in small.named_parameters() if p.dim() > 1) == 7_966
    assert small(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_counts_take_the_first_glob_and_leave_the_rest_whole(channels):
    found = explicit_counts(
        channels["resnet56_cifar"], SelectionRequest(counts={"layer1.0.conv1": 3, "layer1.*.conv1": 11})
    )
    assert found["layer1.0.conv1"] == 3
    assert found["layer1.8.conv1"] == 11
    assert "layer2.0.conv1" not in found
    worth = {g.name: torch.arange(g.width).double() for g in channels["resnet56_cifar"].free}
    kept = select_by_score(channels["resnet56_cifar"], worth, SelectionRequest(counts={"layer1.0.conv1": 3}))
    assert kept["layer1.0.conv1"] == [13, 14, 15]
    assert kept["layer2.0.conv1"] == list(range(32))


@pytest.mark.parametrize(("request_", "says"), [
    (SelectionRequest(counts=(1, 2)), r"2 numbers for 4 free groups \(conv1, conv2, fc1, fc2\)"),
    (SelectionRequest(counts={"conv3": 4}), r"unknown layer of a free group 'conv3'. Did you mean 'conv[12]'"),
    (SelectionRequest(counts={"conv*": 11}), "11 of conv1, which has 10 channels"),
    (SelectionRequest(counts={"conv1": 4}, round_to=8), "leave out select.min_channels and select.round_to"),
    (SelectionRequest(counts={"conv1": 4}, max_ratio=0.5), "leave out select.keep_ratios and select.max_ratio"),
    (
        SelectionRequest(counts={"conv1": 4}, keep_ratios={"conv1": 0.5}),
        "leave out select.keep_ratios and select.max_ratio",
    ),
])  # fmt: skip
def test_what_counts_may_not_say(request_, says, channels):
    with pytest.raises(PruneError, match=says):
        check_target(channels["lenet5_mnist"], request_)


def test_counts_stand_alone(channels):
    worth = {g.name: torch.rand(g.width) for g in channels["lenet5_mnist"].free}
    with pytest.raises(PruneError, match="one of them, not two"):
        select_by_score(channels["lenet5_mnist"], worth, SelectionRequest(counts={"conv1": 4}, keep_ratio=0.5))

"""Cutting in rounds: what a round is asked for, what is left to cut, and one plan for all of it."""

import random

import pytest
import torch
from torch import nn

from dist_prune import models
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.after_pruning import graph_after
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.cost import COSTS
from dist_prune.pruning.selection.ranking import SelectionRequest, cost_share, select_by_score
from dist_prune.pruning.selection.schedule import round_config, share_after_round
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.pruning.graph import test_head_groups as test_units
from tests.support import tiny

NETWORKS = ["resnet8p_cifar", "densenet40_cifar", "mobilenetv1_cifar", "googlenet_cifar", "vit", "swin", "resnext"]


def built(name: str) -> nn.Module:
    """In double precision, for images of one channel: residual, concatenated, depthwise, with heads, grouped."""
    torch.manual_seed(0)
    return test_units.network(name) if name in test_units.NETWORKS else models.create(name, 10, 1).double().eval()


def side(name: str) -> int:
    return test_units.NETWORKS[name][1].get("img_size", 32) if name in test_units.NETWORKS else 32


def some_plan(channels: DependencyGraph, rng: random.Random, share: float = 0.5) -> Plan:
    """A random plan that leaves at least two channels of each free group."""
    kept = {}
    for group in channels.free:
        count = rng.randint(min(group.width, max(2, round(group.width * share))), group.width)
        kept[group.name] = sorted(rng.sample(range(group.width), count))
    return Plan.from_kept(channels, kept)


def worth(channels: DependencyGraph, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.width, generator=generator) for group in channels.free}


@pytest.mark.parametrize("spacing", ["geometric", "linear"])
def test_the_shares_go_down_to_the_target(spacing):
    shares = [share_after_round(0.3, number, 3, spacing) for number in (1, 2, 3)]
    assert shares[-1] == 0.3
    steps = (
        [later / earlier for earlier, later in zip([1.0, *shares], shares, strict=False)]
        if spacing == "geometric"
        else [earlier - later for earlier, later in zip([1.0, *shares], shares, strict=False)]
    )
    assert steps == pytest.approx([steps[0]] * 3)


def described(channels: DependencyGraph) -> tuple:
    couplings = [
        (g.name, g.width, g.producers, g.protected, sorted((c.layer, c.side, c.index, c.channel) for c in g.couplings))
        for g in channels.groups
    ]
    return dict(channels.layers), couplings, channels.other_params, channels.example


@pytest.mark.parametrize("name", NETWORKS)
def test_arithmetic_finds_what_tracing_the_small_network_finds(name):
    model, x = built(name), tiny.example(size=side(name))
    channels = trace_groups(model, x[:1])
    for seed in range(2):
        plan = some_plan(channels, random.Random(seed))
        traced = trace_groups(tiny.cut(model, channels, plan), x[:1])
        assert described(graph_after(channels, plan)) == described(traced)


@pytest.mark.parametrize("name", NETWORKS)
def test_rounds_are_one_cut_of_the_composed_plan(name):
    """Bit for bit, shapes and weights; three rounds by arithmetic against one operation on the dense network."""
    model, x = built(name), tiny.example(size=side(name))
    dense = trace_groups(model, x[:1])
    for seed in range(3):
        rng, small, whole, now = random.Random(seed), model, None, dense
        for _ in range(3):
            plan = some_plan(now, rng, 0.7)
            small = tiny.cut(small, now, plan)
            whole = plan if whole is None else whole.then(plan)
            now = graph_after(dense, whole)
        assert whole is not None
        direct = tiny.cut(model, dense, whole).state_dict()
        assert direct.keys() == small.state_dict().keys()
        for key, tensor in small.state_dict().items():
            assert torch.equal(tensor, direct[key]), key
        assert COSTS["params"].of(dense, whole.counts) == sum(p.numel() for p in small.parameters())


def test_a_depthwise_layer_with_one_channel_left_is_still_that_layer():
    """Traced, it would be an ordinary convolution and lead a group of its own."""
    model, x = built("mobilenetv1_cifar"), tiny.example(size=32)
    dense = trace_groups(model, x[:1])
    group = next(g for g in dense.free if any(dense.layers[c.layer].depthwise for c in g.couplings))
    plan = Plan.from_kept(dense, {group.name: [2]})
    small = graph_after(dense, plan)
    assert [g.name for g in small.groups] == [g.name for g in dense.groups]
    assert small.group(group.name).protected == "it has a single channel"
    assert COSTS["macs"].of(small) == COSTS["macs"].of(dense, plan.counts)
    later = some_plan(small, random.Random(0))
    twice = tiny.cut(tiny.cut(model, dense, plan), small, later)
    assert torch.equal(twice(x), tiny.cut(model, dense, plan.then(later))(x))


@pytest.mark.parametrize(
    "request_",
    [
        SelectionRequest(target=("macs", 0.5), scope="global"),
        SelectionRequest(target=("params", 0.3), scope="local"),
        SelectionRequest(target=("macs", 0.5), scope="isomorphic"),
        SelectionRequest(target=("channels", 0.4), scope="global"),
        SelectionRequest(keep_ratio=0.45),
        SelectionRequest(keep_ratio=0.45, scope="global"),
        SelectionRequest(counts={"layer*.conv1": 7}),
        SelectionRequest(target=("macs", 0.45), min_channels=5, max_ratio=0.75, scope="global"),
        SelectionRequest(target=("macs", 0.5), round_to=4),
        SelectionRequest(target=("macs", 0.6), keep_ratios={"layer3.0.conv1": 0.25}),
    ],
    ids=str,
)
@pytest.mark.parametrize("spacing", ["geometric", "linear"])
def test_three_rounds_end_where_one_shot_ends(request_, spacing):
    """With the same worth of channels in every round the counts are those of one shot; floors are of dense widths."""
    dense = trace_groups(tiny.network(), tiny.example()[:1])
    scores = worth(dense, 3)
    once = Plan.from_kept(dense, select_by_score(dense, scores, request_, normalise=False))
    whole, now = Plan({}, once.widths), dense
    sizes = [1.0]
    for number in (1, 2, 3):
        asked = round_config(request_, now, number, 3, spacing)
        left = {name: table[whole.kept(name)] for name, table in scores.items()}
        whole = whole.then(Plan.from_kept(now, select_by_score(now, left, asked, normalise=False)))
        now = graph_after(dense, whole)
        sizes.append(cost_share(now, "macs", {}))
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]
    for group in dense.free:
        assert whole.counts[group.name] >= request_.floor(group)
    assert whole.removed == once.removed

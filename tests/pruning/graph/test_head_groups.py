"""Whole units: attention heads and the groups of grouped convolutions, scored, cut, gated and loaded again."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dist_prune import models
from dist_prune.errors import PruneError
from dist_prune.methods.base import Method
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.gating import gate_off
from dist_prune.pruning.plan.after_pruning import graph_after
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.saved_idxs import to_saved_idxs
from dist_prune.pruning.selection import cost
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery.rebuild import rebuild
from dist_prune.pruning.surgery.surgeon import apply_plan
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from tests.support import tiny

VIT = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4, "img_size": 8}
SWIN = {"patch_size": 1, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "img_size": 8}
NETWORKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "vit": ("vit_tiny_patch16_224", VIT, "head"),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, "head"),
    "resnext": ("resnext50_32x4d", {"layers": (1, 1, 1, 1), "cardinality": 4, "base_width": 32}, "conv group"),
    "regnet": ("regnetx_002", {}, "conv group"),
}
WEIGHTS = ("l1", "l2", "fpgm", "whc", "random", "group_norm")


def network(which: str) -> nn.Module:
    name, kwargs, _ = NETWORKS[which]
    torch.manual_seed(0)
    model = models.create(name, 10, 1, kwargs=kwargs).double()
    for parameter in model.parameters():  # tables of zeros, shifts of zeros: something has to depend on them
        if parameter.dim() < 2 or float(parameter.detach().abs().max()) == 0:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def plan_of(
    method: Method, bench: DistributedScoringContext, request: SelectionRequest
) -> tuple[DependencyGraph, Plan]:
    channels = method.prunable(bench.graph)
    return channels, method.select(method.score(bench), channels, request)


@pytest.mark.parametrize("which", NETWORKS)
@pytest.mark.parametrize("name", ["l1", "taylor"])
def test_units_are_scored_cut_and_loaded(which, name):
    """Gates say what surgery does; arithmetic counts what is there; the saved weights load without a trace."""
    model, unit = network(which), NETWORKS[which][2]
    bench = tiny.bench(model, images=14)
    channels, plan = plan_of(tiny.method(name), bench, SelectionRequest(keep_ratio=0.5, scope="local"))
    whole = [group for group in channels.free if group.unit == unit]
    assert whole
    assert all(len(plan.removed[group.name]) == group.width // 2 for group in whole)
    images = next(bench.loader.batches([bench.ids])).images
    with gate_off(model, channels, plan.removed), torch.no_grad():
        expected = model(images)
    small = tiny.cut(model, channels, plan)
    with torch.no_grad():
        found = small(images)
    assert torch.allclose(found, expected, atol=1e-9)
    assert sum(p.numel() for p in small.parameters()) == cost.params(channels, plan.counts)
    traced = trace_groups(small, tiny.example()[:1])
    assert cost.macs(traced) == cost.macs(channels, plan.counts)
    shell = models.create(NETWORKS[which][0], 10, 1, kwargs=NETWORKS[which][1]).double()
    again = rebuild(shell, Plan.from_json(plan.to_json()), small.state_dict()).eval()
    with torch.no_grad():
        assert torch.equal(again(images), found)
    again.train()(images).square().mean().backward()


@pytest.mark.parametrize("which", ["vit", "swin"])
def test_attention_knows_how_many_heads_are_left(which):
    model = network(which)
    channels = trace_groups(model, tiny.example()[:1])
    group = next(group for group in channels.free if group.unit == "head")
    small = tiny.cut(model, channels, Plan({group.name: (1,)}, {g.name: g.width for g in channels.groups}))
    path = group.name.removesuffix(".qkv")
    attention: Any = small.get_submodule(path)
    before: Any = model.get_submodule(path)
    assert attention.num_heads == before.num_heads - 1
    width = before.qkv.out_features // (3 * before.num_heads)
    rows = [r for r in range(before.qkv.out_features) if r // width % before.num_heads != 1]
    assert torch.equal(attention.qkv.weight, before.qkv.weight[rows])
    if which == "swin":
        columns = [head for head in range(before.num_heads) if head != 1]
        assert torch.equal(attention.relative_position_bias_table, before.relative_position_bias_table[:, columns])


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("which", ["vit", "resnext"])
def test_criteria_of_weights_give_one_score_per_unit(which, name):
    bench = tiny.bench(network(which), images=7)
    _, plan = plan_of(tiny.method(name), bench, SelectionRequest(target=("macs", 0.6)))
    assert cost.macs(bench.graph, plan.counts) <= 0.6 * cost.macs(bench.graph)


def test_the_l1_of_a_head_is_the_l1_of_its_rows():
    model = network("vit")
    bench = tiny.bench(model, images=7)
    site = next(site for site in bench.hook_points if site.name.endswith("qkv"))
    scores = tiny.method("l1").score(bench)[site.name]
    weight = model.get_submodule(site.name).weight.detach()
    rows = weight.abs().sum(1).view(3, 4, 6).sum((0, 2))  # queries, keys and values of four heads, six wide
    assert torch.allclose(scores, rows)


def test_methods_that_judge_single_channels_leave_units_alone_and_say_so():
    bench = tiny.bench(network("resnext"), images=7)
    channels = tiny.method("hrank").prunable(bench.graph)
    group = next(group for group in channels.groups if group.unit == "conv group")
    assert group.protected == "its channels are whole conv groups, and this method scores single channels"


def test_ranks_agree_on_units(pool):
    one = fingerprint()
    assert pool.run(2, fingerprint) == [one, one]


def fingerprint(ranks: Any = None) -> str:
    bench = tiny.bench(network("vit"), ranks, images=21)
    return plan_of(tiny.method("taylor"), bench, SelectionRequest(target=("macs", 0.6)))[1].fingerprint


def test_scale_norm_and_gated_attention_keep_their_heads():
    """A norm over all heads, or a gate beside them, is made for the dense number of heads."""
    model = models.create("vit_tiny_patch16_224", 10, 1, kwargs={**VIT, "scale_attn_norm": True}).eval()
    channels = trace_groups(model.double(), tiny.example()[:1])
    assert not [group for group in channels.groups if group.unit == "head"]
    copy.deepcopy(model)(tiny.example())


class Shuffled(nn.Module):
    """A channel shuffle, which tracing does not follow, in front of a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3, groups=4)
        self.last = nn.Conv2d(32, 5, 3)

    def forward(self, x):
        x = self.first(x)
        x = x.view(len(x), 4, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.last(torch.relu(self.grouped(x))).mean((2, 3))


class OnTheImage(nn.Module):
    """A grouped convolution whose inputs are the image's channels."""

    def __init__(self):
        super().__init__()
        self.grouped, self.last = nn.Conv2d(3, 27, 3, groups=3), nn.Conv2d(27, 5, 3)

    def forward(self, x):
        return self.last(torch.relu(self.grouped(x))).mean((2, 3))


@pytest.mark.parametrize(("model", "width"), [(Shuffled, 1), (OnTheImage, 3)])
def test_units_that_cannot_be_known_are_protected(model, width):
    torch.manual_seed(0)
    channels = trace_groups(model().double().eval(), tiny.example(width)[:1])
    assert not [group for group in channels.free if "grouped" in group.layers]


def test_heads_and_conv_groups_go_one_by_one():
    """min_channels and rounding are of single channels: eight of four heads are not asked for."""
    channels = trace_groups(network("vit"), tiny.example()[:1])
    head = next(group for group in channels.free if group.unit == "head")
    request = SelectionRequest(min_channels=16, round_to=8)
    assert [request.width(head, count) for count in (0, 1, 3)] == [1, 1, 3]


def test_pruning_information_cannot_say_units():
    channels = trace_groups(network("resnext"), tiny.example()[:1])
    group = next(group for group in channels.free if group.unit == "conv group")
    plan = Plan({group.name: (0,)}, {g.name: g.width for g in channels.groups})
    with pytest.raises(PruneError, match="conv groups, and saved_idxs are filters"):
        to_saved_idxs(plan, channels)


def test_what_a_cut_res2net_leaves_can_be_cut_again():
    """Its splits give protected groups positions that no layer has."""
    model = models.create("res2net50_26w_4s", 10, 3, kwargs={"layers": (1, 1, 1, 1)}).eval()
    channels = trace_groups(model, torch.randn(1, 3, 64, 64))
    plan = Plan.from_kept(channels, {group.name: list(range(group.width // 2)) for group in channels.free})
    left = graph_after(channels, plan)
    assert {group.name: group.width for group in left.free} == {g.name: plan.counts[g.name] for g in channels.free}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "IJepa", "ViTMSN"])
def test_heads_of_transformers_are_cut_whole(name, attention):
    """Queries, keys and values are three layers, and lose the same heads; a rebuilt network answers alike."""
    # with the lowest versions the transformers that is seen refuses the older hub beside it
    transformers = pytest.importorskip("transformers", minversion="5", exc_type=ImportError)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, mlp_ratio=2, image_size=8,
        patch_size=4, num_labels=10, attn_implementation=attention,
    )  # fmt: skip
    kind = getattr(transformers, f"{name}ForImageClassification")
    torch.manual_seed(0)
    model = kind(config).eval()
    images = torch.randn(3, 3, 8, 8)
    graph = trace_groups(model, images[:1])
    heads = [group for group in graph.free if group.unit == "head"]
    assert [group.width for group in heads] == [4, 4]
    assert [len(group.producers) for group in heads] == [3, 3]
    plan = Plan({heads[0].name: (1, 3), heads[1].name: (0,)}, {group.name: group.width for group in graph.groups})
    with gate_off(model, graph, plan.removed), torch.no_grad():
        expected = model(images).logits
    small = copy.deepcopy(model)
    apply_plan(small, graph, plan)
    assert small.get_submodule(heads[0].name).out_features == 12
    assert torch.allclose(small(images).logits, expected, atol=1e-5)
    assert cost.params(graph, plan.counts) == sum(parameter.numel() for parameter in small.parameters())
    again = rebuild(kind(config), plan, small.state_dict()).eval()
    assert torch.equal(again(images).logits, small(images).logits)

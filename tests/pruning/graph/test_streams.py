"""Residual streams behind norms over channels and bare parameters: gated, cut, counted and loaded again."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_prune import models
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.gating import gate_off
from dist_prune.pruning.plan.after_pruning import graph_after
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.rng import seeded_generator
from dist_prune.pruning.selection import cost
from dist_prune.pruning.surgery.rebuild import rebuild
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support import tiny

VIT = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4, "img_size": 8}
SWIN = {"patch_size": 1, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4, "img_size": 8}
NEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
# name, arguments, side of the image, leaders of the streams that have to be free
FAMILIES: dict[str, tuple[str, dict[str, Any], int, tuple[str, ...]]] = {
    "vit": ("vit_tiny_patch16_224", VIT, 8, ("patch_embed.proj",)),
    "deit": ("deit_tiny_distilled_patch16_224", VIT, 8, ("patch_embed.proj",)),
    "deit3": ("deit3_small_patch16_224", VIT, 8, ("patch_embed.proj",)),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 8, ("patch_embed.proj", "layers.1.downsample.reduction")),
    "convnext": ("convnext_atto", NEXT, 32, ("stem.0", "stages.1.downsample.1", "stages.3.downsample.1")),
}


def network(which: str) -> tuple[nn.Module, Tensor]:
    name, kwargs, side, _ = FAMILIES[which]
    torch.manual_seed(0)
    model = models.create(name, 10, 3, kwargs=kwargs).double()
    for parameter in model.parameters():  # norms of ones, tokens of zeros: something has to depend on them
        if parameter.dim() < 2 or float(parameter.detach().std()) < 0.05:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.eval(), torch.randn(2, 3, side, side, dtype=torch.float64)


def some(graph: DependencyGraph, share: float = 0.4) -> Plan:
    """A plan without a random share of every free group."""
    removed = {}
    for group in graph.free:
        order = torch.randperm(group.width, generator=seeded_generator(1, group.name)).tolist()
        removed[group.name] = tuple(sorted(order[: max(1, int(group.width * share))]))
    return Plan(removed, {group.name: group.width for group in graph.groups})


@pytest.mark.parametrize("which", FAMILIES)
def test_gated_off_is_removed(which):
    """The norms compute over the channels that are left, the arithmetic counts them, the file loads without a trace."""
    model, images = network(which)
    graph = trace_groups(model, images[:1], streams=True)
    assert set(FAMILIES[which][3]) <= {group.name for group in graph.free}
    assert cost.params(graph) == sum(p.numel() for p in model.parameters())
    plan = some(graph)
    with torch.no_grad(), gate_off(model, graph, plan.removed):
        expected = model(images)
    small = tiny.cut(model, graph, plan)
    with torch.no_grad():
        found = small(images)
        assert not torch.allclose(found, model(images))
    assert torch.allclose(found, expected, atol=1e-9)
    assert sum(p.numel() for p in small.parameters()) == cost.params(graph, plan.counts)
    again = trace_groups(small, images[:1], streams=True)
    assert cost.macs(again) == cost.macs(graph, plan.counts)
    left = graph_after(graph, plan)
    assert {group.name: group.width for group in left.free} == {group.name: group.width for group in again.free}
    shell = models.create(FAMILIES[which][0], 10, 3, kwargs=FAMILIES[which][1]).double()
    loaded = rebuild(shell, Plan.from_json(plan.to_json()), small.state_dict()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), found)
    loaded.train()(images).square().mean().backward()


@pytest.mark.parametrize("which", FAMILIES)
def test_streams_stay_whole_unless_asked_for(which):
    model, images = network(which)
    graph = trace_groups(model, images[:1])
    assert not set(FAMILIES[which][3]) & {group.name for group in graph.free}
    assert not [layer for layer in graph.layers.values() if layer.kind in ("layer norm", "parameter")]

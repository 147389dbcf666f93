"""Transposed convolutions: cut like gated, counted as they multiply, rebuilt from widths, filters by output."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dist_prune.pruning.graph.groups import HookPoint
from dist_prune.pruning.hooks.gating import gate_off
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection import cost
from dist_prune.pruning.surgery.rebuild import rebuild
from dist_prune.pruning.surgery.surgeon import apply_plan, prune_tensors_like
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.statistic_collection import as_filters
from tests.support import masks

EXAMPLE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Only(nn.Module):
    """One transposed convolution between two convolutions."""

    def __init__(self, groups=1, **more):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8 if groups == 8 else 12, 3, stride=2, groups=groups, **more)
        self.after, self.head = nn.BatchNorm2d(self.up.out_channels), nn.Conv2d(self.up.out_channels, 3, 1)
        self.double().eval()

    def forward(self, x):
        return self.head(self.after(self.up(self.norm(self.first(x)).relu())).relu())


FORMS = {
    "plain": {}, "no bias": {"bias": False}, "output padding": {"padding": 1, "output_padding": 1},
    "dilated": {"dilation": 2}, "two groups": {"groups": 2}, "four groups": {"groups": 4, "bias": False},
    "depthwise": {"groups": 8},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_is_cut_answers_as_what_is_gated(form):
    model = Only(**FORMS[form])
    graph = trace_groups(model, EXAMPLE)
    free = {group.name: group for group in graph.free}
    reaching = [group for group in free.values() if "up" in group.layers]
    assert reaching, {group.name: group.protected for group in graph.groups}
    off = {name: tuple(range(0, group.width, 2)) for name, group in free.items()}
    plan = Plan(off, {group.name: group.width for group in graph.groups})
    small = copy.deepcopy(model)
    apply_plan(small, graph, plan)
    assert sum(p.numel() for p in small.parameters()) == cost.params(graph, plan.counts)
    assert small.up.weight.numel() < model.up.weight.numel()
    with torch.no_grad(), gate_off(model, graph, off):
        expected = model(EXAMPLE)
    with torch.no_grad():
        assert torch.allclose(small(EXAMPLE), expected, atol=1e-9)
        again = rebuild(Only(**FORMS[form]), plan, small.state_dict())
        assert torch.equal(again(EXAMPLE), small(EXAMPLE))
        assert (again.up.in_channels, again.up.out_channels, again.up.groups) == (
            small.up.in_channels, small.up.out_channels, small.up.groups,
        )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_macs_are_those_that_torch_counts(form):
    model = Only(**FORMS[form])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(EXAMPLE)
    assert 2 * cost.macs(trace_groups(model, EXAMPLE)) == counter.get_total_flops()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_filter_is_what_makes_one_output(groups):
    """Output o of the layer depends on row o of the turned weight, and on no other."""
    model = Only(groups=groups)
    point = HookPoint("up", "up", 12, "conv", True)
    turned = as_filters(model, point, model.up.weight)
    assert turned.shape == (12, 8 // groups, 3, 3)
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    for output in (0, 5, 11):
        (gradient,) = torch.autograd.grad(model.up(x)[:, output].square().sum(), model.up.weight)
        used = as_filters(model, point, gradient).flatten(1).abs().sum(1) > 0
        assert used.nonzero().flatten().tolist() == [output]


def test_optimizer_state_is_cut_along():
    model = masks.network()
    graph = trace_groups(model, EXAMPLE)
    off = {group.name: (0,) for group in graph.free}
    plan = Plan(off, {group.name: group.width for group in graph.groups})
    marked = {name: torch.arange(p.numel(), dtype=p.dtype).view_as(p) for name, p in model.named_parameters()}
    cut = prune_tensors_like(model, graph, plan, marked)
    small = copy.deepcopy(model)
    apply_plan(small, graph, plan)
    assert {name: tensor.shape for name, tensor in cut.items()} == {n: p.shape for n, p in small.named_parameters()}


def test_a_segmenter_with_a_skip_is_cut_whole():
    model = masks.network()
    graph = trace_groups(model, EXAMPLE)
    protected = {group.name: group.protected for group in graph.groups if group.protected}
    assert set(protected) == {"head", "aux"}
    assert np.all(["outputs" in why for why in protected.values()])
    assert {group.unit for group in graph.free if "up" in group.layers} == {"conv group"}

"""Standardised convolutions: gated over the inputs that are left, cut, counted and loaded again."""

from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import std_conv
from torch import Tensor, nn

from dist_prune import models
from dist_prune.pruning.graph.standardised_convs import standardise
from dist_prune.pruning.hooks.gating import gate, gate_off, gate_points
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection import cost
from dist_prune.pruning.surgery.rebuild import rebuild
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support import tiny
from tests.support.gate_gradients import check_gate_of_ones

FORMS = {
    "plain": std_conv.StdConv2d,
    "same": partial(std_conv.StdConv2dSame, bias=True),
    "scaled": partial(std_conv.ScaledStdConv2d, gamma=1.7),
    "scaled same": std_conv.ScaledStdConv2dSame,
}


class Network(nn.Module):
    """A stem, a depthwise and a strided convolution, all standardised."""

    def __init__(self, form: Any):
        super().__init__()
        self.one, self.depthwise = form(3, 12, 3), form(12, 12, 3, groups=12)
        self.two, self.head = form(12, 8, 3, stride=2), nn.Linear(8, 10)

    def forward(self, images):
        x = self.depthwise(self.one(images).relu()).relu()
        return self.head(self.two(x).relu().mean((2, 3)))


def network(form: str) -> nn.Module:
    torch.manual_seed(0)
    model = Network(FORMS[form]).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("gain", "bias")):
            parameter.data.add_(torch.rand_like(parameter))
    return model


IMAGES = torch.randn(4, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", FORMS)
def test_gated_off_is_removed(form):
    model = network(form)
    graph = trace_groups(model, IMAGES[:1])
    assert [(group.name, group.width) for group in graph.free] == [("one", 12), ("two", 8)]
    plan = Plan({"one": (0, 3, 7, 11), "two": (2, 5)}, {group.name: group.width for group in graph.groups})
    with torch.no_grad(), gate_off(model, graph, plan.removed):
        expected = model(IMAGES)
    small: Any = tiny.cut(model, graph, plan)
    with torch.no_grad():
        found = small(IMAGES)
    assert torch.allclose(found, expected, atol=1e-12)
    assert not torch.allclose(found, model(IMAGES), atol=1e-3)
    assert sum(p.numel() for p in small.parameters()) == cost.params(graph, plan.counts)
    rows: Any = model.get_parameter("two.weight")[[0, 1, 3, 4, 6, 7]]
    assert torch.equal(small.two.weight, rows[:, [1, 2, 4, 5, 6, 8, 9, 10]])
    loaded = rebuild(Network(FORMS[form]).double(), plan, small.state_dict()).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), found)
    loaded.train()(IMAGES).square().mean().backward()


@pytest.mark.parametrize("form", FORMS)
def test_a_gate_of_ones_is_the_convolution_and_gradients_flow_through_its_statistics(form):
    model = network(form)
    graph = trace_groups(model, IMAGES[:1])
    check_gate_of_ones(model, IMAGES, gate_points(graph, "one"), "one", 12)


def test_gates_of_a_row_per_coalition():
    model = network("scaled")
    graph = trace_groups(model, IMAGES[:1])
    on = torch.ones(2, 12, dtype=torch.bool)
    on[0, [1, 4]], on[1, [0, 2, 3]] = False, False
    with torch.no_grad():
        with gate(model, gate_points(graph, "one"), {"one": on}):
            both = model(torch.cat([IMAGES, IMAGES]))
        for part, row in zip(both.split(4), ~on, strict=True):
            with gate_off(model, graph, {"one": row.nonzero().flatten().tolist()}):
                assert torch.allclose(part, model(IMAGES), atol=1e-12)


def test_a_weight_is_standardised_over_the_inputs_that_are_left():
    module = std_conv.StdConv2d(4, 2, 3).double()
    found = standardise(module, torch.tensor([1.0, 0.0, 1.0, 1.0]))[:, [0, 2, 3]]
    left = module.weight[:, [0, 2, 3]].flatten(1)
    mean, deviation = left.mean(1, keepdim=True), left.var(1, unbiased=False, keepdim=True)
    assert torch.allclose(found.flatten(1), (left - mean) / (deviation + module.eps).sqrt(), atol=1e-12)


def test_a_network_without_norms_is_free():
    torch.manual_seed(0)
    model: nn.Module = models.create("test_nfnet", 10, 3).double().eval()
    images: Tensor = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    graph = trace_groups(model, images[:1])
    assert [group.name for group in graph.groups if group.protected] == ["head.fc"]
    assert cost.params(graph) == sum(p.numel() for p in model.parameters())
    whole = {group.name: tuple(range(group.width // 2)) for group in graph.free if group.width > 1}
    plan = Plan(whole, {group.name: group.width for group in graph.groups})
    with torch.no_grad(), gate_off(model, graph, plan.removed):
        expected = model(images)
    assert torch.allclose(tiny.cut(model, graph, plan)(images), expected, atol=1e-9)

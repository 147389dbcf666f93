"""Arithmetic equals a count, dense and after surgery, under every rule."""

import copy

import pytest
import thop
import torch

from dist_prune import models
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.graph.layer_trace import trace_layers
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection import cost
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.verified_trace import trace_groups

NETS = [
    ("resnet20_cifar", 32),
    ("resnet20p_cifar", 32),
    ("resnet18", 64),
    ("mobilenetv2_100", 64),
    pytest.param("densenet121", 64, marks=pytest.mark.slow),
    ("vgg16_bn_cifar", 32),
    ("densenet40_cifar", 32),
    ("mobilenetv1_cifar", 32),
    ("mobilenetv2_cifar", 32),
]


def counted(model, example) -> tuple[int, int]:
    """MACs of conv and linear layers by looking at the shapes that pass."""
    total = 0
    for layer in trace_layers(model, example).values():
        if layer.kind == "conv":
            total += layer.width_out * (layer.width_in // layer.groups) * layer.kernel * layer.positions
        elif layer.kind == "linear":
            total += layer.width_in * layer.width_out * layer.positions
    return total, sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "size"), NETS)
def test_cost_equals_a_count_after_surgery(name, size):
    torch.manual_seed(0)
    model, example = models.create(name, 10, 3).eval(), torch.randn(1, 3, size, size)
    channels = trace_groups(model, example)
    keep = {g.name: list(range(max(1, g.width * (2 + i % 3) // 5))) for i, g in enumerate(channels.free)}
    plan = Plan.from_kept(channels, keep)
    small = copy.deepcopy(model)
    surgeon.apply_plan(small, channels, plan)
    for network, counts in ((model, {}), (small, plan.counts)):
        assert (cost.macs(channels, counts), cost.params(channels, counts)) == counted(network, example)
        operations, _ = thop.profile(copy.deepcopy(network), (example,), verbose=False)
        assert cost.macs(channels, counts, "thop") == int(operations)
        again = DependencyGraph(trace_layers(network, example), (), 0, (3, size, size))
        assert cost.macs(channels, counts, "thop_old") == cost.macs(again, rule="thop_old")


@pytest.mark.parametrize(
    ("name", "classes", "size", "operations", "parameters"),
    [
        ("vgg16_bn_head_cifar", 10, 32, "314.031", 14_728_266),
        ("vgg16_bn_hidden4096_cifar", 100, 32, "333.310", 34_015_396),
        ("vgg16_bn", 1000, 224, "15510.923", 138_365_992),
        ("resnet50_stem3", 10, 32, "1304.695", 23_520_842),
        ("resnet50_stem3", 100, 32, "1304.879", 23_705_252),
        ("resnet50", 1000, 224, "4111.412", 25_557_032),
        ("mobilenetv2_100", 1000, 224, "314.194", 3_504_872),
    ],
)
def test_the_older_thop_s_totals_of_the_sensitivity_pruner(name, classes, size, operations, parameters):
    """In millions, as its authors have them (15.511 G, 1305 M, 4.111 G); their ResNet-50 ends in a plain pool."""
    model = models.create(name, classes, 3).eval()
    if name == "resnet50":
        model.global_pool.pool = torch.nn.AvgPool2d(7)
    channels = DependencyGraph(trace_layers(model, torch.zeros(1, 3, size, size)), (), 0, (3, size, size))
    assert f"{cost.macs(channels, rule='thop_old') / 1e6:.3f}" == operations
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters

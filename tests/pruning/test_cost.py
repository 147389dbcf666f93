"""Arithmetic equals a count, dense and after surgery, under every rule."""

import copy

import pytest
import thop
import torch

from dist_prune.pruning import cost, surgeon
from dist_prune.pruning.plan import Plan
from dist_prune.pruning.trace import layers_of
from dist_prune.runtime import backbones

NETS = [
    ("resnet20_cifar", 32),
    ("resnet20p_cifar", 32),
    ("resnet18", 64),
    ("mobilenetv2_100", 64),
    ("densenet121", 64),
    ("vgg16_bn_cifar", 32),
    ("densenet40_cifar", 32),
    ("mobilenetv1_cifar", 32),
    ("mobilenetv2_cifar", 32),
]


def counted(model, example) -> tuple[int, int]:
    """MACs of conv and linear layers by looking at the shapes that pass."""
    total = 0
    for layer in layers_of(model, example).values():
        if layer.kind == "conv":
            total += layer.width_out * (layer.width_in // layer.groups) * layer.kernel * layer.positions
        elif layer.kind == "linear":
            total += layer.width_in * layer.width_out * layer.positions
    return total, sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "size"), NETS)
def test_cost_equals_a_count_after_surgery(name, size):
    torch.manual_seed(0)
    model, example = backbones.create(name, 10, 3).eval(), torch.randn(1, 3, size, size)
    channels = surgeon.sites_of(model, example)
    keep = {g.name: list(range(max(1, g.width * (2 + i % 3) // 5))) for i, g in enumerate(channels.free)}
    plan = Plan.keeping(channels, keep)
    small = copy.deepcopy(model)
    surgeon.operate(small, channels, plan)
    for network, counts in ((model, {}), (small, plan.counts)):
        assert (cost.macs(channels, counts), cost.params(channels, counts)) == counted(network, example)
        operations, _ = thop.profile(copy.deepcopy(network), (example,), verbose=False)
        assert cost.macs(channels, counts, "thop") == int(operations)

"""Repeated weights have the values' distribution, and no two equal rows."""

import timm
import torch
from torch import nn

from dist_prune.models.repeated_weights import DRAWN, RepeatedWeights


def test_large_weights_repeat_and_small_ones_are_those_of_torch():
    torch.manual_seed(0)
    plain = nn.Linear(100, 50)
    torch.manual_seed(0)
    with RepeatedWeights():
        same = nn.Linear(100, 50)
        large = nn.Linear(512, 1024, bias=False).weight.detach()
        normal = torch.empty(300_000).normal_(3, 2)
    assert torch.equal(plain.weight, same.weight) and torch.equal(plain.bias, same.bias)
    flat = large.flatten()
    assert torch.equal(flat[:DRAWN], flat[DRAWN : 2 * DRAWN]) and torch.equal(flat[:1000], flat[7 * DRAWN :][:1000])
    assert len(torch.unique(large, dim=0)) == 1024 and len(torch.unique(large.t(), dim=0)) == 512
    assert abs(float(flat.std()) - 512**-0.5 / 3**0.5) < 1e-3
    assert abs(float(normal.mean()) - 3) < 0.05 and abs(float(normal.std()) - 2) < 0.05


def test_a_whole_network():
    with RepeatedWeights():
        model = timm.create_model("resnet18", num_classes=5).eval()
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()
    assert all(len(torch.unique(p, dim=0)) == len(p) for p in model.parameters() if p.dim() == 4)

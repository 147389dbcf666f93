"""Gates whose statistics depend on the channels that are on: their gradients against finite differences."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_prune.pruning.hooks.gating import gate


def check_gate_of_ones(model: nn.Module, images: Tensor, points: Sequence[Any], group: str, width: int) -> None:
    """A gate of ones leaves the network as it is, and its gradients flow through the statistics."""
    ones = torch.ones(width, dtype=torch.float64, requires_grad=True)
    with gate(model, points, {group: ones}):
        out = model(images)
    assert torch.allclose(out, model(images), atol=1e-12)
    out.square().sum().backward()
    found, step = ones.grad, 1e-5
    assert found is not None
    for channel in (0, 7):
        sums = []
        for sign in (1, -1):
            moved = torch.ones(width, dtype=torch.float64)
            moved[channel] += sign * step
            with torch.no_grad(), gate(model, points, {group: moved}):
                sums.append(float(model(images).square().sum()))
        assert float(found[channel]) == pytest.approx((sums[0] - sums[1]) / (2 * step), rel=1e-4, abs=1e-6)

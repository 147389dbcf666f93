"""Channels switched off where they are consumed: one network, and several at once."""

import pytest
import torch

from dist_prune.pruning.hooks.gating import gate, gate_off, gate_points
from tests.support import tiny


@pytest.mark.parametrize("group", [0, 1, -1])
def test_several_networks_at_once_are_each_the_gated_one(group):
    model = tiny.network()
    channels = tiny.bench(model).graph
    name, width = channels.free[group].name, channels.free[group].width
    stays = torch.rand((3, width), generator=torch.Generator().manual_seed(0)) < 0.5
    x = tiny.example()
    with gate(model, gate_points(channels, name), {name: stays}), torch.no_grad():
        together = model(x.repeat(3, 1, 1, 1)).view(3, len(x), -1)
    for number in range(3):
        off = (~stays[number]).nonzero().flatten().tolist()
        with gate_off(model, channels, {name: off}), torch.no_grad():
            assert torch.allclose(together[number], model(x), atol=1e-12)
    with torch.no_grad():
        assert torch.isfinite(together).all() and not torch.allclose(together[0], model(x), atol=1e-4)

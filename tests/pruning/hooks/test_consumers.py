"""Who reads a channel: worked out by hand on a small network with every kind of layer on the way."""

import pytest
import torch
from torch import nn

from dist_prune.pruning.hooks.consumers import consumers, map_consumers, producers
from dist_prune.pruning.hooks.gating import gate, gate_off, gate_points
from dist_prune.pruning.surgery.verified_trace import trace_groups


class Mixed(nn.Module):
    """stem (4) and side (2), concatenated, read by mix (3 of 6 inputs each way); depthwise; pool; flattening."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.side = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(1, 2, 3, padding=1),
        )
        self.mix, self.deep = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.pool, self.head = nn.AvgPool2d(4), nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.side(x), torch.relu(self.norm(self.stem(x)))], 1)
        return self.head(self.pool(torch.relu(self.deep(self.mix(x)))).flatten(1))


@pytest.fixture
def network():
    torch.manual_seed(0)
    model, x = Mixed().double().eval(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    return model, trace_groups(model, x[:1]), x


def test_the_layers_that_read_a_group(network):
    _, channels, _ = network
    named = lambda points: [point.point.name for point in points]  # noqa: E731
    stem, side, mix = (channels.group(name) for name in ("stem", "side", "mix"))
    assert named(consumers(channels, stem)) == named(consumers(channels, side)) == ["mix:in"]
    assert named(consumers(channels, mix)) == ["head:in"], "a depthwise layer and a pool pass channels on"
    assert set(named(consumers(channels, mix, pools=True, depthwise=True))) == {"deep:in", "pool:in", "head:in"}
    assert named(map_consumers(channels, stem)) == ["mix:in"]
    assert named(map_consumers(channels, mix)) == ["head:in"], "no convolution shows its maps"
    assert [named(producers(channels, group)) for group in (stem, side, mix)] == [["stem"], ["side"], ["mix"]]


def test_the_positions_of_channels(network):
    _, channels, _ = network
    (stem,), (side,), (head,) = (consumers(channels, channels.group(name)) for name in ("stem", "side", "mix"))
    assert stem.positions.tolist() == [[2], [3], [4], [5]] and side.positions.tolist() == [[0], [1]]
    assert stem.slots.tolist() == [4, 4, 0, 1, 2, 3] and side.slots.tolist() == [0, 1, 2, 2, 2, 2]
    assert head.positions.tolist() == [list(range(4 * channel, 4 * channel + 4)) for channel in range(5)]
    assert not stem.in_order and not side.in_order and not head.in_order
    assert producers(channels, channels.group("stem"))[0].in_order
    maps = torch.arange(24.0).view(2, 6, 2)
    assert torch.equal(stem.take(maps), maps[:, 2:])
    assert torch.equal(head.take(torch.arange(20.0).view(1, 20, 1)), torch.arange(20.0).view(1, 5, 4))


def test_gates_of_two_groups_in_one_layer(network):
    """Zeros in both halves of a concatenation, and channels that take several positions after flattening."""
    model, channels, x = network
    removed = {"stem": [0, 3], "side": [1], "mix": [2]}
    with torch.no_grad(), gate_off(model, channels, removed):
        gated = model(x)
    with torch.no_grad():
        maps = torch.cat([model.side(x), torch.relu(model.norm(model.stem(x)))], 1)
        maps[:, [1, 2, 5]] = 0
        maps = torch.relu(model.deep(model.mix(maps)))
        maps[:, 2] = 0
        assert torch.allclose(gated, model.head(model.pool(maps).flatten(1)), atol=1e-12)
        assert not torch.allclose(gated, model(x)), "the hooks are gone"


def test_booleans_make_exact_zeros_and_numbers_get_gradients(network):
    model, channels, x = network
    points, stays = gate_points(channels, "stem"), torch.tensor([True, False, True, True])
    with torch.no_grad():
        model.stem.bias[1] = float("inf")
        with gate(model, points, {"stem": stays}):
            assert torch.isfinite(model(x)).all()
        model.stem.bias[1] = 0
    factors = torch.ones(4, dtype=torch.float64, requires_grad=True)
    with gate(model, points, {"stem": factors}):
        model(x).square().sum().backward()
    step = 1e-6
    for channel in range(4):
        sums = []
        for sign in (1, -1):
            moved = torch.ones(4, dtype=torch.float64)
            moved[channel] += sign * step
            with torch.no_grad(), gate(model, points, {"stem": moved}):
                sums.append(float(model(x).square().sum()))
        assert float(factors.grad[channel]) == pytest.approx((sums[0] - sums[1]) / (2 * step), rel=1e-5, abs=1e-8)


def test_hooks_are_gone_after_an_error(network):
    model, channels, x = network
    expected = model(x)
    with (
        pytest.raises(AssertionError, match="3 values for the 4 channels"),
        gate(model, gate_points(channels, "stem"), {"stem": torch.zeros(3)}),
    ):
        model(x)
    assert torch.equal(model(x), expected)

"""Switches off are channels removed; a network in two parts is the network; coalitions are counted right."""

import pytest
import torch
from torch import nn

from dist_prune import models
from dist_prune.pruning.hooks.gating import gate, gate_points
from dist_prune.pruning.hooks.masked_accuracy import MaskedAccuracyCache
from dist_prune.pruning.hooks.split_forward import SplitForward, fx_steps, repeat_batch
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.training.evaluation import num_correct
from tests.support import tiny

NETWORKS = {
    "resnet8p_cifar": (1, 8, {"img_size": 8}), "resnet20_cifar": (1, 8, {"img_size": 8}),
    "lenet5_mnist": (1, 28, {}), "mobilenetv2_100": (3, 32, {}),
}  # fmt: skip


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    in_chans, side, more = NETWORKS[name]
    torch.manual_seed(0)
    model = models.create(name, 10, in_chans, kwargs=more).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)  # type: ignore[union-attr]
    return model.eval(), torch.randn(3, in_chans, side, side, dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_off_is_removed_and_the_tail_is_the_network(name):
    """Per image: other channels are off in other images."""
    model, x = network(name)
    channels, graph = trace_groups(model, x[:1]), fx_steps(model)
    assert graph is not None
    for group in channels.free[:: max(1, len(channels.free) // 5)]:
        points = gate_points(channels, group.name)
        gone = [tuple(range(number, group.width, 3)) for number in range(3)]
        values = torch.ones(3, group.width, dtype=torch.float64)
        for row, off in zip(values, gone, strict=True):
            row[list(off)] = 0
        rest = SplitForward(model, graph, [point.point.layer for point in points])
        rest.verify(x)
        assert not rest.unsplit
        with gate(model, points, {group.name: values}):
            found, again = model(x), rest.tail(repeat_batch(rest.head(x), 1))
        assert torch.equal(found, again)
        for number, off in enumerate(gone):
            plan = Plan({group.name: off}, {g.name: g.width for g in channels.groups})
            small = tiny.cut(model, channels, plan)
            assert torch.allclose(found[number], small(x)[number], atol=1e-9), (name, group.name)
        assert not model(x).allclose(found)


def test_raw_outputs_leave_the_norm_s_shift():
    model, x = network("resnet8p_cifar")
    channels = trace_groups(model, x[:1])
    name = "layer1.0.conv1"
    zeros = {name: torch.zeros(channels.group(name).width)}
    with gate(model, gate_points(channels, name, "output"), zeros):
        left = model(x)
    with gate(model, gate_points(channels, name), zeros):
        gone = model(x)
    bn = model.get_submodule("layer1.0.bn1")
    assert not torch.allclose(left, gone)
    with torch.no_grad():
        bn.running_mean.zero_()  # type: ignore[union-attr,operator]
        bn.bias.zero_()  # type: ignore[union-attr,operator]
    with gate(model, gate_points(channels, name, "output"), zeros):
        assert torch.allclose(model(x), gone), "without a shift there is no difference"


class Branching(nn.Module):
    """Two convolutions that fx cannot follow: control flow on values."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        x = x if x.sum() > 0 else -x
        return self.head(self.b(x).mean((2, 3)))


def test_a_network_that_cannot_be_traced_runs_whole_and_says_so():
    torch.manual_seed(0)
    model = Branching().double().eval()
    assert fx_steps(model) is None
    bench = tiny.bench(model)
    off = torch.tensor([[False] * 4, [True, False, False, True]])
    assert bench.count_correct("a", off) == [tiny.correct(bench)[0], tiny.correct(bench, {"a": [0, 3]})[0]]
    assert any("every coalition of a cost a whole forward pass" in note for note in bench.notes)


@pytest.mark.parametrize("group", ["conv1", "layer2.0.conv1", "layer3.0.downsample.0", "linear"])
def test_coalitions_are_counted_as_surgery_would(group):
    """Against gates over a plain forward pass; neither memory nor the number of sets at a time moves a count."""
    bench = tiny.bench(tiny.network())
    if group == "linear":
        group = bench.graph.free[-1].name
    width = bench.graph.group(group).width
    off = torch.rand(6, width, generator=torch.Generator().manual_seed(1)) < 0.5
    found = bench.count_correct(group, off)
    expected = [tiny.correct(bench, {group: row.nonzero()[:, 0].tolist()})[0] for row in off]
    assert found == expected
    assert len(set(found)) > 1
    assert [bench.count_correct(group, row[None])[0] for row in off] == expected
    assert not bench.notes
    lists = [bench.ids[i : i + tiny.MICRO] for i in range(0, bench.images, tiny.MICRO)]
    seen = []

    def batches(start: int):
        seen.append(start)
        return ((part.images, part.labels) for part in bench.loader.batches(lists[start:]))

    games = MaskedAccuracyCache(bench.model, bench.graph, batches)
    live = games.for_group(group, "consumed", 1).split.head(next(batches(0))[0])
    some = 3 * sum(t.numel() * t.element_size() for t in live)
    for memory in (1, some, 10**9):
        assert games.for_group(group, "consumed", memory).evaluate(off, num_correct).tolist() == expected
    assert 0 < max(seen) < len(lists), "with a little memory the first micro-batches are kept and the others made again"

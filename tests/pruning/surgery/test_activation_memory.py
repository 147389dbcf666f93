"""Peak of activations: by arithmetic as measured, and as module hooks count it where these see everything."""

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import dist_prune as dp
from dist_prune.errors import PruneError
from dist_prune.pruning.plan.after_pruning import graph_after
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.cost import COSTS
from dist_prune.pruning.surgery.activation_memory import measure_peak
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.pruning.selection.test_schedule import built, side, some_plan
from tests.support import tiny


def by_hooks(model: nn.Module, images: torch.Tensor) -> int:
    """For a chain of modules: the image, the input and the output of the largest module."""
    sizes = []

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        alive = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (images, *inputs, output)}
        sizes.append(sum(alive.values()))

    handles = [m.register_forward_hook(hook) for m in model.modules() if not list(m.children())]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return max(sizes)


def chain() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 24, 3, stride=2),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    ).double().eval()  # fmt: skip


@pytest.mark.parametrize("counts", [{}, {"0": 3}, {"0": 1, "3": 20}, {"3": 1}])
def test_a_chain_needs_what_hooks_count(counts):
    model, images = chain(), tiny.example()[:1].clone()  # a storage of its own
    graph = trace_groups(model, images)
    plan = Plan.from_kept(graph, {name: list(range(count)) for name, count in counts.items()})
    small = tiny.cut(model, graph, plan)
    assert COSTS["memory"].of(graph, plan.counts) == by_hooks(small, images)


@pytest.mark.parametrize("name", ["resnet8p_cifar", "mobilenetv1_cifar", "vit"])
def test_arithmetic_is_what_is_measured(name):
    """Residuals, depthwise layers, heads: whatever is alive beside a layer counts."""
    model = built(name)
    images = torch.randn(1, 1, side(name), side(name), dtype=torch.float64)
    graph = trace_groups(model, images)
    assert COSTS["memory"].of(graph) == measure_peak(model, images)
    for number in range(2):
        plan = some_plan(graph, random.Random(number), 0.3)
        small = tiny.cut(model, graph, plan)
        counted = COSTS["memory"].of(graph, plan.counts)
        assert counted == measure_peak(small, images)
        assert counted == COSTS["memory"].of(graph_after(graph, plan)), "the graph of the pruned network agrees"
        assert measure_peak(small, images.expand(4, -1, -1, -1).contiguous()) == 4 * counted, "in proportion to batches"


def test_a_concatenation_is_the_sum_of_its_groups():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
            self.last, self.head = nn.Conv2d(11, 3, 3), nn.Linear(3, 10)

        def forward(self, x):
            for conv in (self.one, self.two):
                x = torch.cat([x, torch.relu(conv(x))], 1)
            return self.head(self.last(x).mean((2, 3)))

    model, image = Dense().double().eval(), tiny.example()[:1].clone()
    graph = trace_groups(model, image)
    for counts in ({}, {"one": 1}, {"two": 2}, {"one": 3, "two": 5}):
        plan = Plan.from_kept(graph, {name: list(range(count)) for name, count in counts.items()})
        assert COSTS["memory"].of(graph, counts) == measure_peak(tiny.cut(model, graph, plan), image), counts


def test_a_residual_stays_alive_beside_its_branch():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.wide = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 16, 1)
            self.back, self.head = nn.Conv2d(16, 4, 1), nn.Linear(4, 10)

        def forward(self, x):
            x = self.stem(x)
            return self.head((x + self.back(self.wide(x))).mean((2, 3)))

    model = Residual().double().eval()
    graph = trace_groups(model, tiny.example()[:1])
    map_bytes = 8 * 8 * 8  # of a channel in float64
    # the image and, at the second convolution of the branch: the residual, its input and its output
    assert COSTS["memory"].of(graph) == map_bytes * (1 + 4 + 16 + 4)
    assert COSTS["memory"].of(graph, {"wide": 8}) == map_bytes * (1 + 4 + 8 + 4)


def test_nothing_changes_the_network_that_was_traced():
    model = tiny.network()
    before = copy.deepcopy(model.state_dict())
    graph = trace_groups(model, tiny.example()[:1])
    COSTS["memory"].of(graph)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_library_takes_the_target():
    model = tiny.network()
    graph = dp.trace(model, (1, 8, 8))
    plan = dp.select(dp.score(model, graph, "l1"), graph, target={"memory": 0.7})
    image = tiny.example()[:1].clone()
    share = measure_peak(dp.prune(model, plan), image) / measure_peak(model, image)
    assert 0.5 < share <= 0.7
    assert "memory" not in dp.costs(graph), "counted on demand alone"


def test_a_graph_without_a_network_says_so():
    graph = replace(trace_groups(tiny.network(), tiny.example()[:1]), memory=None)
    with pytest.raises(PruneError, match=r"target\.memory: this dependency graph was not traced"):
        COSTS["memory"].of(graph)

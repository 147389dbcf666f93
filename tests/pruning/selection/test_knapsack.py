"""The knapsack against brute force, and its laws: within the target, and no single step more is."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.graph.known_costs import LatencyTable
from dist_prune.pruning.selection.knapsack import choose_one_each, discretise, select_by_knapsack
from dist_prune.pruning.selection.ranking import SelectionRequest, cost_share, select_by_score
from dist_prune.pruning.selection.ratio_search import steps_of
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support import tiny


class Chain(nn.Module):
    """Four groups in a row, small enough to try every network; each width decides the cost of two layers."""

    def __init__(self):
        super().__init__()
        widths = (1, 5, 6, 4, 5)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(5, 10)

    def forward(self, x):
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.head(x.mean((2, 3)))


def chain() -> DependencyGraph:
    torch.manual_seed(0)
    return trace_groups(Chain().double().eval(), tiny.example()[:1])


def scores_of(graph: DependencyGraph, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.width, generator=generator, dtype=torch.float64) ** 3 for g in graph.free}


def worth(scores: dict[str, torch.Tensor], kept: dict[str, list[int]]) -> float:
    return sum(float(scores[name][channels].sum() / scores[name].mean()) for name, channels in kept.items())


def every_network(graph: DependencyGraph, request: SelectionRequest):
    for counts in itertools.product(*(steps_of(group, request) for group in graph.free)):
        yield {group.name: count for group, count in zip(graph.free, counts, strict=True)}


def best_worth(graph: DependencyGraph, scores: dict[str, torch.Tensor], request: SelectionRequest) -> float:
    assert request.target is not None
    cost, share = request.target
    best = {name: values.sort(descending=True).values for name, values in scores.items()}
    return max(
        sum(float(best[name][:count].sum() / scores[name].mean()) for name, count in kept.items())
        for kept in every_network(graph, request)
        if cost_share(graph, cost, kept) <= share
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_that_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    values = [rng.normal(size=rng.integers(1, 5)).tolist() for _ in range(4)]
    costs = [rng.integers(0, 9, size=len(group)).tolist() for group in values]
    budget = int(rng.integers(0, 25))
    within = [
        (sum(v[i] for v, i in zip(values, chosen, strict=True)), chosen)
        for chosen in itertools.product(*(range(len(group)) for group in values))
        if sum(c[i] for c, i in zip(costs, chosen, strict=True)) <= budget
    ]
    found = choose_one_each(values, costs, budget)
    if not within:
        assert found is None
        return
    assert found is not None
    assert sum(c[i] for c, i in zip(costs, found, strict=True)) <= budget
    assert sum(v[i] for v, i in zip(values, found, strict=True)) == pytest.approx(max(within)[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_costs_that_add_up_are_solved_exactly(seed, share):
    graph = chain()
    scores, request = scores_of(graph, seed), SelectionRequest(target=("channels", share))
    kept = select_by_knapsack(graph, scores, request)
    assert worth(scores, kept) == pytest.approx(best_worth(graph, scores, request))


@pytest.mark.parametrize("cost", ["macs", "params"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_costs_of_two_widths_are_linearised_until_the_target_is_met(cost, seed, share):
    """Inputs times outputs: what is found is within the target, full, and near what trying every network finds."""
    graph = chain()
    scores, request = scores_of(graph, seed), SelectionRequest(target=(cost, share))
    kept = select_by_knapsack(graph, scores, request)
    counts = {name: len(channels) for name, channels in kept.items()}
    assert cost_share(graph, cost, counts) <= share
    for group in graph.free:
        if counts[group.name] < group.width:
            assert cost_share(graph, cost, {**counts, group.name: counts[group.name] + 1}) > share
    best = best_worth(graph, scores, request)
    assert worth(scores, kept) >= 0.97 * best
    assert worth(scores, kept) >= worth(scores, select_by_score(graph, scores, request))


def test_a_measured_time_is_the_budget():
    """A group that costs no time keeps everything; the slow one pays."""
    graph = chain()
    slow, *others = graph.free
    times = {g.name: tuple((w, 1.0) for w in range(1, g.width + 1)) for g in others}
    times[slow.name] = tuple((w, 0.2 + 0.8 * w / slow.width) for w in range(1, slow.width + 1))
    timed = replace(graph, latency=LatencyTable(times, ((0.2, 0.2), (1.0, 1.0))))
    request = SelectionRequest(target=("latency", 0.7))
    kept = select_by_knapsack(timed, scores_of(graph, 1), request)
    assert cost_share(timed, "latency", {name: len(channels) for name, channels in kept.items()}) <= 0.7
    assert len(kept[slow.name]) < slow.width
    assert all(len(kept[g.name]) == g.width for g in others)


def test_rounding_caps_and_floors_hold():
    graph = trace_groups(tiny.network(), tiny.example()[:1])
    request = SelectionRequest(target=("macs", 0.5), round_to=4, max_ratio=0.75, min_channels=6)
    kept = select_by_knapsack(graph, scores_of(graph, 0), request)
    for group in graph.free:
        assert len(kept[group.name]) in steps_of(group, request)
        assert len(kept[group.name]) >= max(6, group.width / 4)


def test_a_target_below_every_floor_is_refused():
    with pytest.raises(PruneError, match=r"target\.macs: 0\.1 cannot be reached"):
        select_by_knapsack(chain(), scores_of(chain(), 0), SelectionRequest(target=("macs", 0.1), max_ratio=0.3))


def test_units_are_exact_where_costs_are_multiples_and_round_up_elsewhere():
    assert discretise([[0.0, 300.0], [0.0, 450.0]], 900.0) == ([[0, 2], [0, 3]], 6)
    units, budget = discretise([[0.0, 1 / 3], [0.0, 0.7]], 1.0)
    assert all(unit / budget >= cost - 1e-9 for unit, cost in ((units[0][1], 1 / 3), (units[1][1], 0.7)))

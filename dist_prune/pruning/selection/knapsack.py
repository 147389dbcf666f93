"""Channel counts as a knapsack: the largest sum of importance within a cost, by dynamic programming. Pure functions.

Shen et al., Structural Pruning via Latency-Saliency Knapsack (HALP), NeurIPS 2022: every channel step has an importance
and a cost, and the sum of importance is maximised within a budget. The cost of a group's width depends on the widths of
its neighbours (inputs times outputs); so costs are counted around a network, the knapsack is solved, and both are
repeated around the solution until it stays. Of a solution that stays, the linear costs are the real ones.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.selection.cost import raw_time
from dist_prune.pruning.selection.ranking import SelectionRequest, check_target, cost_share, select_by_score, top_k
from dist_prune.pruning.selection.ratio_search import steps_of
from dist_prune.pruning.selection.tie_breaking import check_finite

BINS = 20_000  # largest number of units that a budget is divided into
ITERATIONS = 16  # linearisations, at most
FULL_STEPS = 6  # iterations that go the whole way to the solution; later ones half of it, so that none swings forever


def choose_one_each(values: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int] | None:
    """Choose one option of each group: the multiple-choice knapsack, exact.

    Args:
        values: of each group, the value of each option.
        costs: the same for costs, not negative.
        budget: largest sum of costs, not negative.

    Returns:
        The position of the chosen option of each group, with the largest sum of values (of equal sums the earlier
        option of the last group); None if the cheapest options exceed the budget.
    """
    best = np.zeros(budget + 1)  # largest value of the groups so far within each budget
    taken = []
    for group_values, group_costs in zip(values, costs, strict=True):
        new, option = np.full(budget + 1, -np.inf), np.zeros(budget + 1, dtype=np.int32)
        for number, (value, cost) in enumerate(zip(group_values, group_costs, strict=True)):
            if cost > budget:
                continue
            reached = best[: budget + 1 - cost] + value
            better = reached > new[cost:]
            new[cost:][better] = reached[better]
            option[cost:][better] = number
        best = new
        taken.append(option)
    if best[budget] == -np.inf:
        return None
    chosen, left = [], budget
    for option, group_costs in zip(reversed(taken), reversed(costs), strict=True):
        chosen.append(int(option[left]))
        left -= group_costs[chosen[-1]]
    return chosen[::-1]


def select_by_knapsack(
    graph: DependencyGraph, scores: Mapping[str, Tensor], request: SelectionRequest, normalise: bool = True
) -> dict[str, list[int]]:
    """Keep the channels with the largest sum of importance within a target.

    Args:
        graph: dependency graph of the network that is pruned, with times if the target is a latency.
        scores: free group -> (C,) finite importances.
        request: a target, floors, caps and rounding.
        normalise: divide the importances of each group by the mean of their absolute values.

    Returns:
        Free group -> kept channels, ascending. Their cost is within the target, and no single step more is.

    Raises:
        PruneError: the target cannot be reached, or scores are not finite.
    """
    check_target(graph, request)
    check_finite({group.name: scores[group.name] for group in graph.free})
    problem = _Problem(graph, scores, request, normalise)
    uniform = select_by_score(graph, scores, request, normalise)
    counts = problem.solve(tuple(len(uniform[group.name]) for group in graph.free))
    return top_k(graph, scores, problem.kept(counts), request.seed)


class _Problem:
    """Widths, values and costs of one selection."""

    def __init__(
        self, graph: DependencyGraph, scores: Mapping[str, Tensor], request: SelectionRequest, normalise: bool
    ):
        assert request.target is not None
        self.graph, self.request, (self.cost, self.target) = graph, request, request.target
        self.widths = [steps_of(group, request) for group in graph.free]
        self.values = []
        for group, widths in zip(graph.free, self.widths, strict=True):
            worth = np.sort(scores[group.name].double().numpy())[::-1]
            mean = float(np.abs(worth).mean()) if normalise else 1.0
            sums = np.concatenate([[0.0], np.cumsum(worth / (mean or 1.0))])
            self.values.append([float(sums[width]) for width in widths])

    def kept(self, counts: Sequence[int]) -> dict[str, int]:
        return {group.name: count for group, count in zip(self.graph.free, counts, strict=True)}

    def amount(self, counts: Sequence[int]) -> float:
        """The cost of a network in a measure that adds up over groups as far as it can."""
        if self.graph.latency is not None and self.request.cost is not None and self.request.cost.measured:
            return raw_time(self.graph, self.graph.latency, self.kept(counts))
        assert self.request.cost is not None
        dense, now = self.graph.origin or self.graph, {group.name: group.width for group in self.graph.groups}
        return self.request.cost.of(dense, now | self.kept(counts))

    def fits(self, counts: Sequence[int]) -> bool:
        return cost_share(self.graph, self.cost, self.kept(counts)) <= self.target

    def value(self, counts: Sequence[int]) -> float:
        return sum(
            values[widths.index(count)] for values, widths, count in zip(self.values, self.widths, counts, strict=True)
        )

    def limit(self) -> float:
        """The largest amount within the target; of a time, whose share is a curve over the amount, by bisection."""
        cost = self.request.cost
        assert cost is not None
        if not cost.measured:
            return self.target * cost.of(self.graph.origin or self.graph)
        assert self.graph.latency is not None
        low, high = self.amount([widths[0] for widths in self.widths]), 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.graph.latency.correct(middle) <= self.target else (low, middle)
        return low

    def solve(self, start: tuple[int, ...]) -> tuple[int, ...]:
        """Linearise around a network, solve, and repeat around the solution; then add single steps that still fit."""
        best = max([start, tuple(widths[0] for widths in self.widths)], key=lambda c: (self.fits(c), self.value(c)))
        limit, around = self.limit(), start
        seen = {around}
        for number in range(ITERATIONS):
            solution = self.solve_around(around, limit)
            if solution is None:
                break
            if self.fits(solution) and self.value(solution) > self.value(best):
                best = solution
            if number >= FULL_STEPS:
                solution = self.halfway(around, solution)
            if solution == around or (solution in seen and number >= FULL_STEPS):
                break
            seen.add(solution)
            around = solution
        return self.fill(best)

    def solve_around(self, around: tuple[int, ...], limit: float) -> tuple[int, ...] | None:
        """The best network if every group's cost is what it is in the network ``around``; None if none is within."""
        base = self.amount(around)
        tables = []
        for i, widths in enumerate(self.widths):
            changed = [self.amount([*around[:i], width, *around[i + 1 :]]) - base for width in widths]
            tables.append(list(np.maximum.accumulate(changed)))
        least = [table[0] for table in tables]
        budget = limit - base - math.fsum(least)
        if budget < 0:
            return tuple(widths[0] for widths in self.widths)
        above = [[cost - table[0] for cost in table] for table in tables]
        costs, units = discretise(above, budget)
        chosen = choose_one_each(self.values, costs, units)
        return None if chosen is None else tuple(w[i] for w, i in zip(self.widths, chosen, strict=True))

    def halfway(self, one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            min(widths, key=lambda width, a=a, b=b: (abs(2 * width - a - b), width))
            for widths, a, b in zip(self.widths, one, other, strict=True)
        )

    def fill(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """Add single steps while some fit, those of the most value for their cost first."""
        while True:
            base, steps = self.amount(counts), []
            for i, (widths, values) in enumerate(zip(self.widths, self.values, strict=True)):
                at = widths.index(counts[i])
                if at + 1 < len(widths):
                    more = (*counts[:i], widths[at + 1], *counts[i + 1 :])
                    gain, price = values[at + 1] - values[at], max(self.amount(more) - base, 1e-12)
                    if gain > 0 and self.fits(more):
                        steps.append((gain / price, -i, more))
            if not steps:
                return counts
            counts = max(steps)[2]


def discretise(costs: Sequence[Sequence[float]], budget: float) -> tuple[list[list[int]], int]:
    """Turn costs into whole units.

    Args:
        costs: of the options of each group, not negative.
        budget: in the same unit, not negative.

    Returns:
        The costs and the budget in units: exact if all costs are whole multiples of one that divides the budget into
        at most ``BINS`` units; otherwise costs are rounded up, so what fits in units fits.
    """
    flat = [cost for group in costs for cost in group]
    if all(float(cost).is_integer() for cost in flat):
        unit = math.gcd(*(int(cost) for cost in flat)) or 1
        if budget // unit <= BINS:
            return [[int(cost) // unit for cost in group] for group in costs], int(budget // unit)
    unit = budget / BINS if budget > 0 else 1.0
    return [[math.ceil(cost / unit - 1e-9) for cost in group] for group in costs], int(budget / unit)

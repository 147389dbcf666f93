"""From scores to kept channels: ranking, budgets, floors and rounding, the same for every method. Pure."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor

from dist_prune.errors import PruneError, unknown
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
from dist_prune.pruning.selection.cost import COSTS, Cost, target_keys
from dist_prune.pruning.selection.tie_breaking import all_tied, ascending_order, check_finite

Kept = dict[str, list[int]]
AUTO_WIDTH = 64  # channels of a group in which a cost's step is a small one


@dataclass(frozen=True)
class SelectionRequest:
    """What the recipe's ``select`` and ``target`` sections ask of a method.

    ``round_to`` 0 is the step of the target's cost in wide groups, and 1 elsewhere. ``seed`` orders
    the channels of a group whose scores are all equal.
    """

    threshold: float | None = None
    keep_ratio: float | None = None
    counts: Mapping[str, int] | Sequence[int] | None = None
    scope: Literal["local", "global"] = "local"
    min_channels: int = 1
    round_to: int = 1
    target: tuple[str, float] | None = None  # name of a cost, share of the dense network's
    index: int | None = None
    include: tuple[str, ...] = ()
    keep_ratios: Mapping[str, float] = field(default_factory=dict)
    max_ratio: float | Mapping[str, float] | None = None
    seed: int = 0

    @classmethod
    def of(cls, recipe: Any) -> "SelectionRequest":
        """The request of a recipe (its ``select`` and ``target`` sections)."""
        return cls(
            **recipe.select.model_dump(exclude={"exclude", "plan"}), target=recipe.target.asked(), seed=recipe.seed
        )

    @property
    def cost(self) -> Cost | None:
        """What the target is of."""
        return COSTS[self.target[0]] if self.target else None

    def multiple(self, group: ChannelGroup) -> int:
        """What kept channels are a multiple of; whole units (heads, conv groups) go one by one."""
        if group.unit != "channel":
            return 1
        if self.round_to:
            return self.round_to if group.dense > self.round_to else 1
        return self.cost.step if self.cost and group.dense >= AUTO_WIDTH else 1

    def floor(self, group: ChannelGroup) -> int:
        """The fewest channels that may stay, before rounding; ``min_channels`` is of single channels."""
        most = self.max_ratio if isinstance(self.max_ratio, float | int) else match_group(self.max_ratio or {}, group)
        least = 0 if most is None else math.ceil(group.dense * (1 - most) - 1e-9)
        return min(max(1, self.min_channels if group.unit == "channel" else 1, least), group.width)

    def width(self, group: ChannelGroup, count: int) -> int:
        """``count`` made legal: of ``keep_ratios`` where the group is named there, not below the floor, rounded up."""
        own = match_group(self.keep_ratios, group)
        count = max(count if own is None else round(group.dense * own), self.floor(group))
        return min(math.ceil(count / self.multiple(group)) * self.multiple(group), group.width)

    def globs(self) -> dict[str, tuple[str, ...]]:
        """Recipe key -> the globs of layer names in it."""
        most = tuple(self.max_ratio) if isinstance(self.max_ratio, Mapping) else ()
        return {"include": self.include, "keep_ratios": tuple(self.keep_ratios), "max_ratio": most}


def match_group(named: Mapping[str, float], group: ChannelGroup) -> float | None:
    """The value of the first glob that fits one of the group's layers."""
    fits = (value for glob, value in named.items() if any(fnmatchcase(name, glob) for name in group.producers))
    return next(fits, None)


def cost_share(graph: DependencyGraph, quantity: str, kept: Mapping[str, int]) -> float:
    """``Cost.share`` of the cost of that name."""
    return COSTS[quantity].share(graph, kept)


def reachable(graph: DependencyGraph, request: SelectionRequest, quantity: str) -> tuple[float, float]:
    """The smallest and the largest share that this request can leave."""
    return cost_share(graph, quantity, {g.name: request.width(g, 1) for g in graph.free}), 1.0


def check_target(graph: DependencyGraph, request: SelectionRequest) -> None:
    """PruneError where the target lies outside the reachable range, or the counts do not fit the groups."""
    if request.counts is not None:
        explicit_counts(graph, request)
    if request.target is None or not COSTS[request.target[0]].known(graph):
        return
    quantity, share = request.target
    low, high = reachable(graph, request, quantity)
    if not low <= share <= high:
        raise PruneError(
            f"target.{quantity}: {share} cannot be reached. With every free group at its floor {low:.4f} "
            f"of the dense {quantity} is left, so the reachable range is {low:.4f} to {high:.4f}. Raise the target, "
            "lower select.min_channels or select.round_to, raise select.max_ratio, or choose a network form with fewer "
            "protected groups ('dist-prune check RECIPE' lists them)."
        )


def check_ranking(request: SelectionRequest) -> None:
    """PruneError where a ranking method is asked for a threshold, or for both or none of target and keep ratio."""
    if request.threshold is not None:
        raise PruneError(
            "select.threshold: this method ranks channels and has no threshold; set a target or keep_ratio"
        )
    if sum(asked is not None for asked in (request.target, request.keep_ratio, request.counts)) != 1:
        raise PruneError(
            f"this method ranks channels: set {target_keys()}, or select.keep_ratio, or select.counts; one of them, "
            "not two"
        )


def explicit_counts(graph: DependencyGraph, request: SelectionRequest) -> dict[str, int]:
    """Free group -> the number of channels that the request's ``counts`` keep of it; groups that none names are absent.

    PruneError where a glob fits no free group, a number is larger than the group is wide, or a list has another length
    than there are free groups.
    """
    asked = request.counts or {}
    if request.min_channels > 1 or request.round_to > 1:
        raise PruneError("select.counts says exactly how many stay; leave out select.min_channels and select.round_to")
    if request.keep_ratios or request.max_ratio is not None:
        raise PruneError("select.counts says exactly how many stay; leave out select.keep_ratios and select.max_ratio")
    if not isinstance(asked, Mapping):
        if len(asked) != len(graph.free):
            names = ", ".join(group.name for group in graph.free)
            raise PruneError(
                f"select.counts: {len(asked)} numbers for {len(graph.free)} free groups ({names}). "
                "Give one for each, or write glob: number for some."
            )
        found = {group.name: count for group, count in zip(graph.free, asked, strict=True)}
    else:
        found = {}
        for glob, count in asked.items():
            fits = [g for g in graph.free if any(fnmatchcase(name, glob) for name in g.producers)]
            if not fits:
                known = [name for group in graph.free for name in group.producers]
                raise PruneError(f"select.counts: {unknown('layer of a free group', glob, known)}")
            for group in fits:
                found.setdefault(group.name, count)
    for group in graph.free:
        if found.get(group.name, 0) > group.width:
            raise PruneError(f"select.counts: {found[group.name]} of {group.name}, which has {group.width} channels")
    return found


def refill_to_floor(graph: DependencyGraph, request: SelectionRequest, kept: Kept, worth: Mapping[str, Tensor]) -> Kept:
    """Put the worthiest removed channels back where a group is below its floor or off its rounding.

    A group of ``select.keep_ratios`` keeps its worthiest ones.
    """
    out = {}
    for group in graph.free:
        stays, own = list(kept.get(group.name, range(group.width))), worth[group.name]
        place = {channel: rank for rank, channel in enumerate(ascending_order(group.name, own, request.seed))}
        lacking = request.width(group, len(stays)) - len(stays)
        if lacking > 0:  # of equals the smaller index comes back first
            back = {i: (-place[i], 0) if all_tied(own) else (-float(own[i]), i) for i in range(group.width)}
            stays += sorted(set(range(group.width)) - set(stays), key=back.__getitem__)[:lacking]
        elif lacking < 0:  # select.keep_ratios keeps fewer of this group
            stays = sorted(stays, key=place.__getitem__)[-lacking:]
        out[group.name] = sorted(stays)
    return out


def counts_of(kept: Kept) -> dict[str, int]:
    return {group: len(stays) for group, stays in kept.items()}


def select_by_score(
    graph: DependencyGraph, scores: Mapping[str, Tensor], request: SelectionRequest, normalise: bool = True
) -> Kept:
    """Keep the channels with the largest scores.

    ``local`` removes the same share from every group; ``global`` ranks all channels together, with ``normalise`` after
    dividing each group's scores by the mean of their sizes. Ties fall to the smaller index, which goes first; in a
    group whose scores are all equal, to the seed. With a target the removal goes on, channel by channel in that order,
    until the network is no larger than asked.
    """
    check_ranking(request)
    check_target(graph, request)
    check_finite({group.name: scores[group.name] for group in graph.free})
    if request.counts is not None:
        found = explicit_counts(graph, request)
        return top_k(graph, scores, {g.name: found.get(g.name, g.width) for g in graph.free}, request.seed)
    order = _removal_order(graph, scores, request, normalise)
    total, gone = sum(g.dense for g in (graph.origin or graph).free), sum(g.gone for g in graph.groups)
    if request.target is not None:
        quantity, share = request.target
        prefix = first_true(
            lambda n: cost_share(graph, quantity, _left(graph, order[:n], request)) <= share, len(order)
        )
    elif request.keep_ratio is None:
        raise PruneError(f"this method ranks channels: set {target_keys('select.keep_ratio')}")
    elif request.scope == "local":
        prefix = sum(1 for priority, _, _ in order if priority <= 1 - request.keep_ratio + 1e-9)
    else:
        prefix = max(0, int((1 - request.keep_ratio) * total + 1e-9) - gone)
    counts = _left(graph, order[:prefix], request)
    if request.target is not None:
        counts = _topped_up(graph, counts, order[:prefix], request)
    return top_k(graph, scores, counts, request.seed)


def top_k(graph: DependencyGraph, scores: Mapping[str, Tensor], counts: Mapping[str, int], seed: int = 0) -> Kept:
    """The ``counts[group]`` channels with the largest scores of each free group; equals as in ``ascending_order``."""
    return {
        g.name: sorted(ascending_order(g.name, scores[g.name], seed)[g.width - counts[g.name] :])
        for g in graph.free
        if g.name in counts
    }


def first_true(holds: Callable[[int], bool], last: int) -> int:
    """The smallest n in 0..last for which a monotone ``holds(n)`` is true (``last`` where none is)."""
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _removal_order(
    graph: DependencyGraph, scores: Mapping[str, Tensor], request: SelectionRequest, normalise: bool
) -> list[tuple[float, int, int]]:
    """(priority, group number, how many go before it in its group), what goes first in front.

    Of groups whose scores are all equal, and equal to one another's, the same shares go: none is emptied first.
    """
    order = []
    for number, group in enumerate(graph.free):
        worth = sorted(float(value) for value in scores[group.name])
        mean = (sum(map(abs, worth)) / len(worth) or 1.0) if normalise else 1.0
        alike = all_tied(scores[group.name])
        for rank, value in enumerate(worth):
            share = (group.gone + rank + 1) / group.dense
            priority = share if request.scope == "local" else value / mean
            order.append((priority, share if alike else 0.0, number, rank))
    return [(priority, number, rank) for priority, _, number, rank in sorted(order)]


def _left(graph: DependencyGraph, gone: list[tuple[float, int, int]], request: SelectionRequest) -> dict[str, int]:
    cut = [0] * len(graph.free)
    for _, number, _ in gone:
        cut[number] += 1
    return {g.name: request.width(g, g.width - cut[i]) for i, g in enumerate(graph.free)}


def _topped_up(
    graph: DependencyGraph, counts: dict[str, int], gone: list[tuple[float, int, int]], request: SelectionRequest
) -> dict[str, int]:
    """Whole steps of rounding put back, the last removed first, where the network stays within the target.

    A step cuts 8 channels where 1 may be missing to the target; groups without rounding need none of it.
    """
    assert request.target is not None
    quantity, share = request.target
    for group in dict.fromkeys(graph.free[number] for _, number, _ in reversed(gone)):
        step, own = request.multiple(group), match_group(request.keep_ratios, group)
        while step > 1 and own is None and counts[group.name] < group.width:
            more = {**counts, group.name: min(counts[group.name] + step, group.width)}
            if cost_share(graph, quantity, more) > share:
                break
            counts = more
    return counts

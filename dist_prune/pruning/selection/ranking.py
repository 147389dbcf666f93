"""From scores to kept channels: ranking, budgets, floors and rounding, the same for every method. Pure functions."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor

from dist_prune.errors import PruneError, unknown
from dist_prune.pruning.graph.blocks import Block
from dist_prune.pruning.graph.groups import SINGLE, ChannelGroup, DependencyGraph
from dist_prune.pruning.selection.cost import COSTS, Cost, target_keys
from dist_prune.pruning.selection.removal_order import Removal, Scope, block_sets, dense_blocks, removal_order
from dist_prune.pruning.selection.tie_breaking import all_tied, ascending_order, check_finite

Kept = dict[str, list[int]]
AUTO_WIDTH = 64  # dense width from which on a cost's step is small enough to round to


@dataclass(frozen=True)
class SelectionRequest:
    """What a selection of channels has to fulfil: the recipe's ``select`` and ``target`` sections.

    Widths, shares and ratios refer to the dense network, also in later rounds. A ranking needs exactly one of
    ``target``, ``keep_ratio`` and ``counts``: ``SelectionRequest(target=("macs", 0.5), min_channels=4)``.

    Attributes:
        threshold: similarity threshold, in [0, 1], of methods that have one; rankings have none.
        keep_ratio: share of channels to keep, in (0, 1].
        counts: number of kept channels: glob of layer names -> number, or one number for each free group in order.
        scope: ``local`` removes the same share of every group; ``global`` ranks the channels of all groups together;
            ``isomorphic`` ranks those of groups of equal structure together, and removes the same share of each set.
        min_channels: fewest channels that a group of single channels keeps.
        round_to: kept channels are a multiple of it; 0: of the step of the target's cost in wide groups, else of 1.
        target: (name of a cost, share of the dense network's amount that is kept at most).
        index: number, from 1, of the value that is taken of a method's grid.
        include: globs of layer names; other groups are left alone. Empty: all groups.
        keep_ratios: glob of layer names -> share of channels to keep there, whatever the scores say.
        max_ratio: largest share of a group that may be removed: of all groups, or by glob of layer names.
        seed: orders the channels of a group whose scores are all equal.
        depth: whether residual blocks may go as a whole: beside channels, or ``only`` they. The last block of each
            structure stays, and ``max_ratio`` (a number) holds for blocks as well. Blocks with layers that
            ``keep_ratios`` or a mapping of ``max_ratio`` name stay.
    """

    threshold: float | None = None
    keep_ratio: float | None = None
    counts: Mapping[str, int] | Sequence[int] | None = None
    scope: Scope = "local"
    min_channels: int = 1
    round_to: int = 1
    target: tuple[str, float] | None = None
    index: int | None = None
    include: tuple[str, ...] = ()
    keep_ratios: Mapping[str, float] = field(default_factory=dict)
    max_ratio: float | Mapping[str, float] | None = None
    seed: int = 0
    depth: bool | Literal["only"] = False

    @classmethod
    def of(cls, recipe: Any) -> "SelectionRequest":
        """Make the request of a recipe from its ``select``, ``target`` and ``seed``."""
        section = recipe.select.model_dump(exclude={"exclude", "plan", "search", "from_", "norms"})
        return cls(**section, target=recipe.target.asked(), seed=recipe.seed)

    @property
    def cost(self) -> Cost | None:
        """The cost that the target names; None without a target."""
        return COSTS[self.target[0]] if self.target else None

    def multiple(self, group: ChannelGroup) -> int:
        """Return the number that a group's kept channels are a multiple of; 1 for heads and conv groups."""
        if group.unit not in SINGLE:
            return 1
        if self.round_to:
            return self.round_to if group.dense > self.round_to else 1
        return self.cost.step if self.cost and group.dense >= AUTO_WIDTH else 1

    def floor(self, group: ChannelGroup) -> int:
        """Return the fewest channels that a group may keep, before rounding up to ``multiple``."""
        most = self.max_ratio if isinstance(self.max_ratio, float | int) else match_group(self.max_ratio or {}, group)
        least = 0 if most is None else math.ceil(group.dense * (1 - most) - 1e-9)
        return min(max(1, self.min_channels if group.unit in SINGLE else 1, least), group.width)

    def width(self, group: ChannelGroup, count: int) -> int:
        """Return the legal number of kept channels for a wanted one.

        Args:
            group: a free group.
            count: number of channels that a ranking would keep; ``keep_ratios`` replaces it if it names the group.

        Returns:
            The number, not below the floor, rounded up to ``multiple``, at most the group's width.
        """
        if self.depth == "only":
            return group.width
        ratio = match_group(self.keep_ratios, group)
        count = max(count if ratio is None else round(group.dense * ratio), self.floor(group))
        return min(math.ceil(count / self.multiple(group)) * self.multiple(group), group.width)

    def most_blocks(self, graph: DependencyGraph, blocks: Sequence[Block]) -> int:
        """Return how many more of the blocks of one structure may go.

        Args:
            graph: dependency graph of the network that is pruned.
            blocks: those that are left.
        """
        dense = dense_blocks(graph, blocks)
        share = self.max_ratio if isinstance(self.max_ratio, float | int) else 1.0
        least = max(1, math.ceil(dense * (1 - share) - 1e-9))
        return max(0, len(blocks) - least)

    def globs(self) -> dict[str, tuple[str, ...]]:
        """Return recipe key -> the globs of layer names in it."""
        most = tuple(self.max_ratio) if isinstance(self.max_ratio, Mapping) else ()
        return {"include": self.include, "keep_ratios": tuple(self.keep_ratios), "max_ratio": most}


def match_group(named: Mapping[str, float], group: ChannelGroup) -> float | None:
    """Return the value of the first glob that matches a producer of the group, or None."""
    matches = (value for glob, value in named.items() if any(fnmatchcase(name, glob) for name in group.producers))
    return next(matches, None)


def cost_share(graph: DependencyGraph, quantity: str, kept: Mapping[str, int]) -> float:
    """Return the share of the dense amount that is left, of the cost named ``quantity`` (see ``Cost.share``)."""
    return COSTS[quantity].share(graph, kept)


def reachable(graph: DependencyGraph, request: SelectionRequest, quantity: str) -> tuple[float, float]:
    """Return the smallest and the largest share of the cost ``quantity`` that this request can leave."""
    return cost_share(graph, quantity, smallest_counts(graph, request)), 1.0


def smallest_counts(graph: DependencyGraph, request: SelectionRequest) -> dict[str, int]:
    """Return the numbers of kept channels of the smallest network that a request can leave.

    With ``depth`` as many blocks are gone as may go, the last ones of each structure: which ones go is up to scores.
    """
    counts = {group.name: request.width(group, 1) for group in graph.free}
    if not request.depth:
        return counts
    in_order = {block.key: torch.tensor([-float(i)]) for i, block in enumerate(graph.free_blocks)}
    gone = [b for blocks in block_sets(graph, in_order) for b in blocks[: request.most_blocks(graph, blocks)]]
    return counts | graph.without(block.path for block in gone)


def check_target(graph: DependencyGraph, request: SelectionRequest) -> None:
    """Raise PruneError if the target is outside the reachable range or the counts do not fit the groups."""
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


def check_depth(graph: DependencyGraph, request: SelectionRequest) -> None:
    """Raise PruneError if blocks are to go, and there are none or the numbers of channels are given."""
    if not request.depth:
        return
    if not (graph.origin or graph).free_blocks:
        raise PruneError(
            "select.depth: this network has no residual block with a plain shortcut, x + f(x), that could go as a "
            "whole. In the library, trace it with depth=True"
        )
    if request.counts is not None:
        raise PruneError("select.counts says how many channels stay; leave out select.depth, or set a target")


def hold_blocks(graph: DependencyGraph, request: SelectionRequest) -> DependencyGraph:
    """Return a copy with every block protected that holds layers whose share ``keep_ratios`` or ``max_ratio`` sets.

    A block that goes loses all of the channels inside, whatever share of them was to stay.

    Raises:
        PruneError: blocks are to go, and none may any more.
    """
    if not request.depth:
        return graph
    most = request.max_ratio if isinstance(request.max_ratio, Mapping) else {}
    keys = {"keep_ratios": tuple(request.keep_ratios), "max_ratio": tuple(glob for glob in most if most[glob] < 1)}

    def leave(block: Block) -> Block:
        named = [
            f"select.{key} {match!r} names its layers" for key, globs in keys.items() if (match := block.match(globs))
        ]
        return replace(block, protected=block.protected or next(iter(named), ""))

    held = replace(graph, blocks=tuple(map(leave, graph.blocks)))
    if graph.free_blocks and not held.free_blocks:
        raise PruneError(
            f"select.depth: no block may go, {graph.free_blocks[0].path} for one because "
            f"{held.blocks[graph.blocks.index(graph.free_blocks[0])].protected}. Name fewer layers there, or write "
            "select.max_ratio as a number, which holds for blocks as well"
        )
    return held


def check_ranking(request: SelectionRequest) -> None:
    """Raise PruneError if the request has a threshold, or not exactly one of target, keep ratio and counts."""
    if request.threshold is not None:
        raise PruneError(
            "select.threshold: this method ranks channels and has no threshold; set a target or keep_ratio"
        )
    if sum(value is not None for value in (request.target, request.keep_ratio, request.counts)) != 1:
        raise PruneError(
            f"this method ranks channels: set {target_keys()}, or select.keep_ratio, or select.counts; one of them, "
            "not two"
        )


def explicit_counts(graph: DependencyGraph, request: SelectionRequest) -> dict[str, int]:
    """Resolve the request's ``counts``.

    Returns:
        Free group -> number of kept channels; groups that no glob matches are absent.

    Raises:
        PruneError: a glob matches no free group, a number is larger than the group's width, a list has not one number
            for each free group, or other keys contradict ``counts``.
    """
    requested = request.counts or {}
    if request.min_channels > 1 or request.round_to > 1:
        raise PruneError("select.counts says exactly how many stay; leave out select.min_channels and select.round_to")
    if request.keep_ratios or request.max_ratio is not None:
        raise PruneError("select.counts says exactly how many stay; leave out select.keep_ratios and select.max_ratio")
    if not isinstance(requested, Mapping):
        if len(requested) != len(graph.free):
            names = ", ".join(group.name for group in graph.free)
            raise PruneError(
                f"select.counts: {len(requested)} numbers for {len(graph.free)} free groups ({names}). "
                "Give one for each, or write glob: number for some."
            )
        counts = {group.name: count for group, count in zip(graph.free, requested, strict=True)}
    else:
        counts = {}
        for glob, count in requested.items():
            matches = [g for g in graph.free if any(fnmatchcase(name, glob) for name in g.producers)]
            if not matches:
                known = [name for group in graph.free for name in group.producers]
                raise PruneError(f"select.counts: {unknown('layer of a free group', glob, known)}")
            for group in matches:
                counts.setdefault(group.name, count)
    for group in graph.free:
        if counts.get(group.name, 0) > group.width:
            raise PruneError(f"select.counts: {counts[group.name]} of {group.name}, which has {group.width} channels")
    return counts


def refill_to_floor(graph: DependencyGraph, request: SelectionRequest, kept: Kept, worth: Mapping[str, Tensor]) -> Kept:
    """Restore the removed channels with the largest scores in groups below their floor or off their rounding.

    A group that ``keep_ratios`` names keeps only as many as that, those with the largest scores.

    Args:
        graph: dependency graph of the network that is pruned.
        request: floors, rounding and keep ratios.
        kept: free group -> channels that a method keeps; groups that are absent keep all.
        worth: free group -> (C,) scores.

    Returns:
        Free group -> kept channels, ascending.
    """
    refilled = {}
    for group in graph.free:
        channels, scores = list(kept.get(group.name, range(group.width))), worth[group.name]
        rank_of = {channel: rank for rank, channel in enumerate(ascending_order(group.name, scores, request.seed))}
        lacking = request.width(group, len(channels)) - len(channels)
        if lacking > 0:  # of equal scores the smaller index is restored first
            key = {i: (-rank_of[i], 0) if all_tied(scores) else (-float(scores[i]), i) for i in range(group.width)}
            channels += sorted(set(range(group.width)) - set(channels), key=key.__getitem__)[:lacking]
        elif lacking < 0:  # select.keep_ratios keeps fewer of this group
            channels = sorted(channels, key=rank_of.__getitem__)[-lacking:]
        refilled[group.name] = sorted(channels)
    return refilled


def counts_of(kept: Kept) -> dict[str, int]:
    """Return group -> number of kept channels."""
    return {group: len(channels) for group, channels in kept.items()}


def select_by_score(
    graph: DependencyGraph, scores: Mapping[str, Tensor], request: SelectionRequest, normalise: bool = True
) -> Kept:
    """Keep the channels with the largest scores.

    With the scope ``local`` the same share of every group is removed; with ``global`` all channels are ranked together;
    with ``isomorphic`` the same share of every set of groups of equal structure is removed (see ``removal_order``).
    Of equal scores the smaller index is removed first; if all scores of a group are equal, the seed decides. With a
    target, channels are removed one by one in that order until the network is no larger than the target; then whole
    steps of rounding are restored if they fit.

    Args:
        graph: dependency graph of the network that is pruned.
        scores: free group -> (C,) finite scores; larger scores are kept.
        request: exactly one of target, keep ratio and counts, with floors and rounding. With ``depth`` the scores of
            blocks are there as well.
        normalise: divide the scores of each group by the mean of their absolute values before they are compared.

    Returns:
        Free group -> kept channels, ascending; and the key of each block that goes -> an empty list.

    Raises:
        PruneError: the request does not fit a ranking or cannot be reached (with ``depth``: with these scores), or
            scores are not finite.
    """
    check_ranking(request)
    check_target(graph, request)
    check_depth(graph, request)
    scored = [group.name for group in graph.free] + [block.key for block in graph.free_blocks if request.depth]
    check_finite({name: scores[name] for name in scored})
    if request.counts is not None:
        explicit = explicit_counts(graph, request)
        return top_k(graph, scores, {g.name: explicit.get(g.name, g.width) for g in graph.free}, request.seed)
    order = removal_order(graph, scores, request.scope, normalise, bool(request.depth))
    sets = block_sets(graph, scores) if request.depth else []
    if request.depth == "only":
        order = _split(order, len(graph.free))[0]
    if request.target is not None:
        quantity, share = request.target
        prefix = first_true(
            lambda n: cost_share(graph, quantity, _counts_after(graph, order[:n], request, sets)) <= share, len(order)
        )
    elif request.keep_ratio is None:
        raise PruneError(f"this method ranks channels: set {target_keys('select.keep_ratio')}")
    elif request.scope != "global":
        prefix = sum(1 for priority, _, _ in order if priority <= 1 - request.keep_ratio + 1e-9)
    else:
        total, gone = _competitors(graph, request)
        prefix = max(0, int((1 - request.keep_ratio) * total + 1e-9) - gone)
    counts = _counts_after(graph, order[:prefix], request, sets)
    if request.target is not None and sets:  # the last block may go far below the target: fewer channels have to
        quantity, share = request.target
        blocks, channels = _split(order[:prefix], len(graph.free))
        fewer = first_true(
            lambda n: cost_share(graph, quantity, _counts_after(graph, blocks + channels[:n], request, sets)) <= share,
            len(channels),
        )
        order, prefix = blocks + channels[:fewer], len(blocks) + fewer
        counts = _counts_after(graph, order, request, sets)
    if request.target is not None:
        _check_met(graph, request, counts)
        counts = _restore_steps(graph, counts, order[:prefix], request)
    blocks_gone: Kept = {block.key: [] for block in graph.blocks if counts.get(block.key) == 0}
    return top_k(graph, scores, counts, request.seed) | blocks_gone


def top_k(graph: DependencyGraph, scores: Mapping[str, Tensor], counts: Mapping[str, int], seed: int = 0) -> Kept:
    """Keep the ``counts[group]`` channels with the largest scores; equal scores are ordered as in ``ascending_order``.

    Args:
        graph: dependency graph of the network that is pruned.
        scores: free group -> (C,) scores.
        counts: free group -> number of channels to keep; groups that are absent are absent in the result.
        seed: the run's seed, for groups whose scores are all equal.
    """
    return {
        g.name: sorted(ascending_order(g.name, scores[g.name], seed)[g.width - counts[g.name] :])
        for g in graph.free
        if g.name in counts
    }


def first_true(holds: Callable[[int], bool], last: int) -> int:
    """Return the smallest n in 0..last for which a monotone ``holds(n)`` is true, or ``last`` if there is none."""
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _competitors(graph: DependencyGraph, request: SelectionRequest) -> tuple[int, int]:
    """How many channels and blocks of the dense network compete under ``global``, and how many of them are gone."""
    dense = graph.origin or graph
    here = {block.path for block in graph.blocks}
    lost = [block.path for block in dense.blocks if block.path not in here]
    total, gone = (len(dense.free_blocks), len(dense.free_blocks) - len(graph.free_blocks)) if request.depth else (0, 0)
    if request.depth == "only":
        return total, gone
    inside = dense.inside(lost)  # channels of these groups went with their blocks
    gone += sum(group.dense if group.name in inside else group.gone for group in graph.groups)
    return total + sum(group.dense for group in dense.free), gone


def _check_met(graph: DependencyGraph, request: SelectionRequest, counts: Mapping[str, int]) -> None:
    """Raise PruneError if blocks are to go and a counted target is missed: which ones stay is up to their scores."""
    if not request.depth or request.target is None or COSTS[request.target[0]].measured:
        return
    quantity, share = request.target
    left = cost_share(graph, quantity, counts)
    if left > share:
        raise PruneError(
            f"target.{quantity}: {share} cannot be reached with these scores. Blocks of one structure may differ in "
            f"size, and the one with the largest score stays: {left:.4f} of the dense {quantity} is left at least. "
            "Raise the target, lower select.min_channels or select.round_to, or raise select.max_ratio"
            + ("; select.depth=true removes channels as well." if request.depth == "only" else ".")
        )


def _split(order: Sequence[Removal], free: int) -> tuple[list[Removal], list[Removal]]:
    """The removals of blocks, and those of channels of ``free`` groups, each in their order."""
    return [one for one in order if one[1] >= free], [one for one in order if one[1] < free]


def _counts_after(
    graph: DependencyGraph, gone: Sequence[Removal], request: SelectionRequest, sets: Sequence[Sequence[Block]] = ()
) -> dict[str, int]:
    """The numbers of kept channels after some removals; ``sets``: of ``block_sets``, for removals of blocks."""
    cut = [0] * (len(graph.free) + len(sets))
    for _, number, _ in gone:
        cut[number] += 1
    counts = {g.name: request.width(g, g.width - cut[i]) for i, g in enumerate(graph.free)}
    paths = [
        block.path
        for blocks, count in zip(sets, cut[len(graph.free) :], strict=True)
        for block in blocks[: min(count, request.most_blocks(graph, blocks))]
    ]
    return counts | graph.without(paths)


def _restore_steps(
    graph: DependencyGraph, counts: dict[str, int], gone: Sequence[Removal], request: SelectionRequest
) -> dict[str, int]:
    """Restore whole steps of rounding, the last removed first, as long as the network stays within the target.

    A step may remove 8 channels although 1 would reach the target. Groups without rounding are left as they are.
    """
    assert request.target is not None
    quantity, share = request.target
    free, inside = len(graph.free), graph.inside(b.path for b in graph.blocks if counts.get(b.key) == 0)
    for group in dict.fromkeys(graph.free[number] for _, number, _ in reversed(gone) if number < free):
        if group.name in inside:
            continue
        step, ratio = request.multiple(group), match_group(request.keep_ratios, group)
        while step > 1 and ratio is None and counts[group.name] < group.width:
            more = {**counts, group.name: min(counts[group.name] + step, group.width)}
            if cost_share(graph, quantity, more) > share:
                break
            counts = more
    return counts

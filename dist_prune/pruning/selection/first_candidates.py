"""The rules that a search starts from: plans that need no image, each within any target. Pure functions."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.selection.knapsack import select_by_knapsack
from dist_prune.pruning.selection.ranking import SelectionRequest, counts_of, select_by_score
from dist_prune.pruning.selection.ratio_search import Counts, RatioSearch, with_target
from dist_prune.pruning.selection.removal_order import Scope


def ratio_search(
    graph: DependencyGraph,
    importance: Mapping[str, Tensor],
    request: SelectionRequest,
    targets: tuple[float, ...],
    candidates: int,
    normalise: bool = True,
) -> RatioSearch:
    """Make a search whose first candidates are the uniform, the global, the isomorphic and the knapsack plan.

    Args:
        graph: dependency graph of the network that is pruned, with times if the target is a latency.
        importance: free group -> (C,) finite scores.
        request: a target, floors, caps, rounding and the seed.
        targets: further shares of the target's cost that the search serves.
        candidates: number of candidates.
        normalise: as in ``select_by_score``.
    """
    assert request.target is not None
    own = request.target[1]
    request = replace(request, scope="local")

    def by_scope(scope: Scope) -> Callable[[float], Counts]:
        def counts_at(target: float) -> Counts:
            asked = replace(with_target(request, target), scope=scope)
            counts = counts_of(select_by_score(graph, importance, asked, normalise))
            return tuple(counts[group.name] for group in graph.free)

        return counts_at

    def by_knapsack(target: float) -> Counts:
        kept = select_by_knapsack(graph, importance, with_target(request, target), normalise)
        return tuple(len(kept[group.name]) for group in graph.free)

    starts = [
        ("uniform", by_scope("local")), ("global", by_scope("global")), ("isomorphic", by_scope("isomorphic")),
        ("knapsack", by_knapsack),
    ]  # fmt: skip
    return RatioSearch(graph, request, (own, *(share for share in targets if share != own)), candidates, starts)

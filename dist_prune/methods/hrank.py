"""HRank: the mean rank of a channel's feature maps.

Lin, Ji, Wang, Zhang, Zhang, Tian, Shao: HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020, section 3:

    s_i = 1/N sum over images n of rank(A_i^(n)),    A_i^(n) (H, W)

The maps are read at the inputs of the convolutions that consume the channel, and summed over these. It needs
calibration images; no labels, no gradients.
"""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from dist_prune.methods import base
from dist_prune.methods.needs import Needs
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph, HookPoint
from dist_prune.pruning.hooks.consumers import consumer_points, flatten_tables, map_consumers, sum_consumers
from dist_prune.pruning.hooks.statistics import State, Statistic
from dist_prune.pruning.selection.group_scores import protect


class HRank(base.RankingMethod):
    """Channels whose maps have a low rank go first.

    Groups without maps (1x1 maps, or consumed by linear layers) are protected.
    """

    paper = "Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020"
    needs = Needs(note="and a rank for each map")
    equivariant = False  # small maps often have equal ranks, and ties fall to the smaller index

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Add the ranks of the maps at the inputs of all consumers.

        Returns:
            For each consuming layer ``<layer>:in:ranks``, (positions,) int64 summed over images, and
            ``<layer>:in:images``, () int64, their number.
        """
        return flatten_tables(context.collect(consumer_points(self.prunable(context.graph), map_consumers), MapRanks()))

    def prunable(self, graph: DependencyGraph) -> DependencyGraph:
        graph = super().prunable(graph)

        def reason(group: ChannelGroup) -> str:
            if any(point.point.kind == "linear" for point in map_consumers(graph, group)):
                return "a linear layer consumes its maps: single numbers have no rank"
            single = all(graph.layers[name].positions == 1 for name in group.producers)
            return "its 1x1 maps have no rank" if single else ""

        return protect(graph, reason)

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        ranks = sum_consumers(scores, graph, "ranks", map_consumers)
        images = int(self.require_score(scores, f"{consumer_points(graph, map_consumers)[0].name}:images"))
        return {name: table.double() / images for name, table in ranks.items()}


class MapRanks(Statistic):
    """Ranks of feature maps. States: ``ranks`` (positions,) int64 summed over images; ``images`` () int64."""

    def states(self, point: HookPoint) -> dict[str, State]:
        return {"ranks": State("sum", (point.width,)), "images": State("sum")}

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        tables["ranks"] += map_rank(maps).sum(0)
        tables["images"] += len(maps)


def map_rank(maps: Tensor) -> Tensor:
    """The rank of each map: the number of singular values above eps max(H, W) times the largest one.

    Args:
        maps: (..., H, W) floating point; eps is that of its dtype.

    Returns:
        (...) int64.
    """
    exact = torch.float64 if maps.dtype == torch.float64 else torch.float32  # torch has no svd of half floats
    values = torch.linalg.svdvals(maps.to(exact))
    limit = torch.finfo(maps.dtype).eps * max(maps.shape[-2:]) * values.amax(-1, keepdim=True)
    return (values > limit).sum(-1)

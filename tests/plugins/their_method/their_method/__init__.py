"""A method of a third party: channels whose activations hardly vary are removed first."""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from dist_prune.methods import base
from dist_prune.pruning.graph.groups import DependencyGraph, HookPoint
from dist_prune.pruning.hooks.consumers import (
    consumer_points,
    flatten_maps,
    flatten_tables,
    map_consumers,
    sum_consumers,
)
from dist_prune.pruning.hooks.statistics import State, Statistic


class TheirRange(base.RankingMethod):
    """Channels with a small range of values are removed first."""

    paper = "A third party, The range of activations"

    def score(self, context: base.ScoringContext) -> base.Scores:
        return flatten_tables(context.collect(consumer_points(context.graph, map_consumers), Highest()))

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        return sum_consumers(scores, graph, "highest", map_consumers)


class Highest(Statistic):
    """State: ``highest`` (C,) float64, the largest value of each channel."""

    def states(self, point: HookPoint) -> dict[str, State]:
        return {"highest": State("max", (point.width,), torch.float64)}

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        torch.maximum(tables["highest"], flatten_maps(maps, point).double().amax((0, 2)), out=tables["highest"])

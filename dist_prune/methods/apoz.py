"""APoZ: the average percentage of zeros among a channel's activations.

Hu, Peng, Tai, Tang: Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep Architectures, 2016
(arXiv 1607.03250), section 3:

    APoZ_i = #{A_i(n, x, y) = 0} / (N H W),    s_i = 1 - APoZ_i

A_i are the activations after the ReLU, N the images. They are read at the inputs of the layers that consume the
channel. It needs calibration images; no labels, no gradients.
"""

from collections.abc import Mapping, MutableMapping

from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.methods import base
from dist_prune.methods.needs import Needs
from dist_prune.pruning.graph.groups import DependencyGraph, HookPoint
from dist_prune.pruning.hooks.consumers import (
    consumer_points,
    flatten_maps,
    flatten_tables,
    map_consumers,
    sum_consumers,
)
from dist_prune.pruning.hooks.statistics import State, Statistic


class Apoz(base.RankingMethod):
    """Channels whose activations are mostly zero go first."""

    paper = "Hu et al., Network Trimming: A Data-Driven Neuron Pruning Approach, 2016"
    needs = Needs()

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Count the zeros at the inputs of all consumers.

        Returns:
            For each consuming layer ``<layer>:in:zeros`` and ``<layer>:in:count``, (positions,) int64: zero
            activations, and all activations, of each input channel.

        Raises:
            PruneError: no activation is zero, so the network has no ReLU.
        """
        tables = context.collect(consumer_points(context.graph, map_consumers), ZeroCounts())
        if sum(int(counts["zeros"].sum()) for counts in tables.values()) == 0:
            raise PruneError(
                "apoz: not one activation is exactly zero; it counts the zeros after a ReLU, and this network has "
                "another activation. Choose a criterion of weights or gradients ('dist-prune list methods')."
            )
        return flatten_tables(tables)

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        zeros, count = (sum_consumers(scores, graph, state, map_consumers) for state in ("zeros", "count"))
        return {name: 1 - zeros[name].double() / count[name].double() for name in zeros}


class ZeroCounts(Statistic):
    """Zeros of feature maps. States: ``zeros`` and ``count`` (positions,) int64, per channel of the layer's input."""

    def states(self, point: HookPoint) -> dict[str, State]:
        return {"zeros": State("sum", (point.width,)), "count": State("sum", (point.width,))}

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        values = flatten_maps(maps, point)
        tables["zeros"] += (values == 0).sum((0, 2))
        tables["count"] += values.shape[0] * values.shape[2]

"""Group Fisher: squared gradients of one mask per coupled channel, divided by the cost of the channel.

Liu, Zhang, Kuang, Zhou, Xue, Wang, Chen, Yang, Liao, Zhang: Group Fisher Pruning for Practical Network Compression,
ICML 2021:

    s_i = 1/cost_i sum over images n of (sum over consumers X and positions of A_i^X dL_n/dA_i^X)^2

cost_i is the activation memory, or the MACs, that channel i takes. The paper removes one channel every few iterations
while it trains. Here all channels are scored at once; ``schedule.rounds`` alternates scoring, pruning and training, and
costs are those of the network of the round. It needs calibration images, their labels and gradients.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from dist_prune.methods import base
from dist_prune.methods.needs import GRADIENTS
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
from dist_prune.pruning.hooks.consumers import GateGradient, consumer_points, flatten_tables, sum_consumers
from dist_prune.pruning.selection.cost import macs


class Options(base.RankingOptions):
    """Options of Group Fisher.

    Attributes:
        normalise: as in ``RankingOptions``; off by default, because the paper compares groups as they are.
        per: the cost of a channel that its score is divided by.
    """

    normalise: bool = base.select_only(
        False, description="select.scope global: division of each group's scores by their mean; off in the paper"
    )
    per: Literal["memory", "macs", "nothing"] = base.select_only(
        "memory", description="divisor of a score: activations (values per image) or MACs of the channel"
    )


class GroupFisher(base.RankingMethod):
    """Channels whose mask changes the loss least for their cost go first."""

    paper = "Liu et al., Group Fisher Pruning for Practical Network Compression, ICML 2021"
    needs = GRADIENTS
    Options = Options

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Collect the mask gradients of each image at the inputs of all consumers.

        Returns:
            For each consuming layer ``<layer>:in:gate``, (n, positions) float64, a row per image, and
            ``<layer>:in:batches``, () int64, the number of micro-batches.
        """
        return flatten_tables(
            context.collect(consumer_points(context.graph), GateGradient(batches=False), backward=True)
        )

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        gates = sum_consumers(scores, graph, "gate")
        return {g.name: gates[g.name].square().sum(0) / self._channel_cost(graph, g) for g in graph.free}

    def _channel_cost(self, graph: DependencyGraph, group: ChannelGroup) -> float:
        if self.options.per == "memory":
            return output_values(graph, group)
        return macs(graph) - macs(graph, {group.name: group.width - 1}) if self.options.per == "macs" else 1


def output_values(graph: DependencyGraph, group: ChannelGroup) -> int:
    """Activation memory of one channel: output values of convolutions and linear layers for one image.

    Args:
        graph: the dependency graph.
        group: one of its groups.
    """
    return sum(
        len(coupling.index) // group.width * graph.layers[coupling.layer].positions
        for coupling in group.couplings
        if coupling.side == "out" and graph.layers[coupling.layer].kind in ("conv", "linear")
    )

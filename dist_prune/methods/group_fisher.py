"""Group Fisher: the squared derivative of each image's loss by one mask per group, for what the channel costs.

Liu, Zhang, Kuang, Zhou, Xue, Wang, Chen, Yang, Liao, Zhang: Group Fisher Pruning for Practical Network Compression,
ICML 2021. The paper removes one channel every few iterations while it trains. Here all channels are scored at once;
schedule.rounds scores, cuts and trains by turns, and what a channel costs is that of the network of its round.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from dist_prune.methods import base
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
from dist_prune.pruning.hooks.consumers import GateGradient, consumer_points, flatten_tables, sum_consumers
from dist_prune.pruning.selection.cost import macs


class Options(base.RankingOptions):
    normalise: bool = base.select_only(
        False, description="select.scope global: the paper compares all groups as they are, by what a channel costs"
    )
    per: Literal["memory", "macs", "nothing"] = base.select_only(
        "memory", description="what a score is divided by: activations or MACs that go with the channel"
    )


class GroupFisher(base.RankingMethod):
    """The mask's derivative is a sum over all layers that consume the channel; it is squared per image."""

    paper = "Liu et al., Group Fisher Pruning for Practical Network Compression, ICML 2021"
    Options = Options

    def score(self, context: base.ScoringContext) -> base.Scores:
        """``<layer>:in:gate``: (n, C) float64, a row per image."""
        return flatten_tables(
            context.collect(consumer_points(context.graph), GateGradient(batches=False), backward=True)
        )

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        gates = sum_consumers(scores, graph, "gate")
        return {g.name: gates[g.name].square().sum(0) / self._price(graph, g) for g in graph.free}

    def _price(self, graph: DependencyGraph, group: ChannelGroup) -> float:
        if self.options.per == "memory":
            return output_values(graph, group)
        return macs(graph) - macs(graph, {group.name: group.width - 1}) if self.options.per == "macs" else 1


def output_values(graph: DependencyGraph, group: ChannelGroup) -> int:
    """Values that convolutions and linear layers put out for one channel of the group and one image."""
    return sum(
        len(coupling.index) // group.width * graph.layers[coupling.layer].positions
        for coupling in group.couplings
        if coupling.side == "out" and graph.layers[coupling.layer].kind in ("conv", "linear")
    )

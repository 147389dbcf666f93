"""Group Fisher: the squared derivative of each image's loss by one mask per group, for what the channel costs.

Liu, Zhang, Kuang, Zhou, Xue, Wang, Chen, Yang, Liao, Zhang: Group Fisher Pruning for Practical Network Compression,
ICML 2021. The paper removes one channel every few iterations while it trains. Here all channels are scored at once;
schedule.rounds scores, cuts and trains by turns, and what a channel costs is that of the network of its round.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from dist_prune.methods import method
from dist_prune.pruning.channels import ChannelGroup, Channels
from dist_prune.pruning.consumers import GateGradient, consumer_sites, flatten_tables, sum_consumers
from dist_prune.pruning.cost import macs


class Options(method.RankingOptions):
    normalise: bool = method.for_select(
        False, description="select.scope global: the paper compares all groups as they are, by what a channel costs"
    )
    per: Literal["memory", "macs", "nothing"] = method.for_select(
        "memory", description="what a score is divided by: activations or MACs that go with the channel"
    )


class GroupFisher(method.Ranking):
    """The mask's derivative is a sum over all layers that consume the channel; it is squared per image."""

    paper = "Liu et al., Group Fisher Pruning for Practical Network Compression, ICML 2021"
    Options = Options

    def score(self, bench: method.Bench) -> method.Scores:
        """``<layer>:in:gate``: (n, C) float64, a row per image."""
        return flatten_tables(bench.observe(consumer_sites(bench.channels), GateGradient(batches=False), backward=True))

    def worth(self, scores: Mapping[str, Tensor], channels: Channels) -> dict[str, Tensor]:
        gates = sum_consumers(scores, channels, "gate")
        return {g.name: gates[g.name].square().sum(0) / self._price(channels, g) for g in channels.free}

    def _price(self, channels: Channels, group: ChannelGroup) -> float:
        if self.options.per == "memory":
            return memory(channels, group)
        return macs(channels) - macs(channels, {group.name: group.width - 1}) if self.options.per == "macs" else 1


def memory(channels: Channels, group: ChannelGroup) -> int:
    """Values that convolutions and linear layers put out for one channel of the group and one image."""
    return sum(
        len(coupling.index) // group.width * channels.layers[coupling.layer].positions
        for coupling in group.couplings
        if coupling.side == "out" and channels.layers[coupling.layer].kind in ("conv", "linear")
    )

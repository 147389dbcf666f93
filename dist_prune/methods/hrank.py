"""HRank: a channel whose feature maps have low rank carries little.

Lin, Ji, Wang, Zhang, Zhang, Tian, Shao: HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020, section 3.
"""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from dist_prune.methods import method
from dist_prune.pruning.channels import ChannelGroup, Channels, Site
from dist_prune.pruning.combine import judged
from dist_prune.pruning.consumers import consumer_sites, flatten_tables, map_consumers, sum_consumers
from dist_prune.pruning.statistic import State, Statistic


class HRank(method.Ranking):
    """The mean rank of a channel's map as the next convolution consumes it, summed over all that do."""

    paper = "Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020"
    equivariant = False  # small maps often have equal ranks, and ties fall to the smaller index

    def score(self, bench: method.Bench) -> method.Scores:
        """``<layer>:in:ranks`` (C,) int64 summed over images; ``<layer>:in:images`` () int64."""
        return flatten_tables(bench.observe(consumer_sites(self.limits(bench.channels), map_consumers), Ranks()))

    def limits(self, channels: Channels) -> Channels:
        channels = super().limits(channels)

        def reason(group: ChannelGroup) -> str:
            if any(point.site.kind == "linear" for point in map_consumers(channels, group)):
                return "a linear layer consumes its maps: single numbers have no rank"
            single = all(channels.layers[name].positions == 1 for name in group.producers)
            return "its 1x1 maps have no rank" if single else ""

        return judged(channels, reason)

    def worth(self, scores: Mapping[str, Tensor], channels: Channels) -> dict[str, Tensor]:
        ranks = sum_consumers(scores, channels, "ranks", map_consumers)
        images = int(self.need(scores, f"{consumer_sites(channels, map_consumers)[0].name}:images"))
        return {name: table.double() / images for name, table in ranks.items()}


class Ranks(Statistic):
    """States: ``ranks`` (C,) int64; ``images``."""

    def states(self, site: Site) -> dict[str, State]:
        return {"ranks": State("sum", (site.width,)), "images": State("sum")}

    def update(
        self, site: Site, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        tables["ranks"] += rank_of(maps).sum(0)
        tables["images"] += len(maps)


def rank_of(maps: Tensor) -> Tensor:
    """(..., H, W) -> (...) int64: singular values above eps max(H, W) times the largest one."""
    values = torch.linalg.svdvals(maps)
    limit = torch.finfo(maps.dtype).eps * max(maps.shape[-2:]) * values.amax(-1, keepdim=True)
    return (values > limit).sum(-1)

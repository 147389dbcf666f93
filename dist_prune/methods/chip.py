"""CHIP: a channel is independent where the nuclear norm of all maps falls when its row is zero.

Sui, Yin, Xie, Phan, Zonouz, Yuan: CHIP: CHannel Independence-based Pruning for Compact Neural Networks, NeurIPS 2021.
"""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from dist_prune.methods import method
from dist_prune.pruning.channel_tensors import placed
from dist_prune.pruning.channels import Channels, Site
from dist_prune.pruning.consumers import consumer_sites, flatten_maps, flatten_tables, map_consumers, sum_consumers
from dist_prune.pruning.statistic import State, Statistic

BUDGET = 2**23  # float64 values that one batch of Gram matrices may hold


class Chip(method.Ranking):
    """|A|_* - |M_i A|_*, the mean over images; A (C, HW) is what the next convolution consumes of one group."""

    paper = "Sui et al., CHIP: CHannel Independence-based Pruning for Compact Neural Networks, NeurIPS 2021"

    def score(self, bench: method.Bench) -> method.Scores:
        """``<layer>:in:independence``: (C,) float64, the mean over images."""
        parts: dict[str, list[list[list[int]]]] = {}
        for group in bench.channels.free:
            for point in map_consumers(bench.channels, group):
                parts.setdefault(point.site.name, []).append(point.positions.tolist())
        found = bench.observe(consumer_sites(bench.channels, map_consumers), Independence(parts))
        return flatten_tables(
            {name: {"independence": tables["independence"].mean(0)} for name, tables in found.items()}
        )

    def worth(self, scores: Mapping[str, Tensor], channels: Channels) -> dict[str, Tensor]:
        return sum_consumers(scores, channels, "independence", map_consumers)


class Independence(Statistic):
    """State: ``independence`` (n, positions) float64, each group's channels by themselves.

    ``parts``: tap -> for each group, for each channel, its positions in the input (the value lies at the first one).
    """

    def __init__(self, parts: Mapping[str, list[list[list[int]]]]):
        self.parts = parts

    def states(self, site: Site) -> dict[str, State]:
        return {"independence": State("rows", (site.width,), torch.float64)}

    def update(
        self, site: Site, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        values = flatten_maps(maps, site).double()
        for part in self.parts[site.name]:
            index = placed(torch.tensor(part), maps)
            found = torch.stack([independence(image[index].flatten(1)) for image in values])
            tables["independence"][ids[:, None], index[:, 0]] = found


def independence(image: Tensor) -> Tensor:
    """(C, P) -> (C,): what the nuclear norm loses with each row, by eigenvalues of the smaller Gram matrix."""
    count, positions = image.shape
    rows = torch.arange(count, device=image.device)
    if positions < count:
        whole, side = image.T @ image, positions
    else:
        whole, side = image @ image.T, count
    out = []
    for part in rows.split(max(1, BUDGET // side**2)):
        grams = whole.repeat(len(part), 1, 1)
        if positions < count:
            grams -= image[part, :, None] * image[part, None, :]
        else:
            places = torch.arange(len(part), device=image.device)
            grams[places, part, :] = 0
            grams[places, :, part] = 0
        out.append(nuclear(grams))
    return nuclear(whole) - torch.cat(out)


def nuclear(gram: Tensor) -> Tensor:
    """Nuclear norm of a matrix from its Gram matrix (..., m, m)."""
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum(-1)

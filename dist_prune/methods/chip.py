"""CHIP: a channel is independent where the nuclear norm of all maps falls when its row is zero.

Sui, Yin, Xie, Phan, Zonouz, Yuan: CHIP: CHannel Independence-based Pruning for Compact Neural Networks, NeurIPS 2021.
"""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from dist_prune.methods import base
from dist_prune.pruning.graph.channel_tensors import to_device_of
from dist_prune.pruning.graph.groups import DependencyGraph, HookPoint
from dist_prune.pruning.hooks.consumers import (
    consumer_points,
    flatten_maps,
    flatten_tables,
    map_consumers,
    sum_consumers,
)
from dist_prune.pruning.hooks.statistics import State, Statistic

BUDGET = 2**23  # float64 values that one batch of Gram matrices may hold


class Chip(base.RankingMethod):
    """|A|_* - |M_i A|_*, the mean over images; A (C, HW) is what the next convolution consumes of one group."""

    paper = "Sui et al., CHIP: CHannel Independence-based Pruning for Compact Neural Networks, NeurIPS 2021"

    def score(self, context: base.ScoringContext) -> base.Scores:
        """``<layer>:in:independence``: (C,) float64, the mean over images."""
        parts: dict[str, list[list[list[int]]]] = {}
        for group in context.graph.free:
            for point in map_consumers(context.graph, group):
                parts.setdefault(point.point.name, []).append(point.positions.tolist())
        found = context.collect(consumer_points(context.graph, map_consumers), Independence(parts))
        return flatten_tables(
            {name: {"independence": tables["independence"].mean(0)} for name, tables in found.items()}
        )

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        return sum_consumers(scores, graph, "independence", map_consumers)


class Independence(Statistic):
    """State: ``independence`` (n, positions) float64, each group's channels by themselves.

    ``parts``: tap -> for each group, for each channel, its positions in the input (the value lies at the first one).
    """

    def __init__(self, parts: Mapping[str, list[list[list[int]]]]):
        self.parts = parts

    def states(self, point: HookPoint) -> dict[str, State]:
        return {"independence": State("rows", (point.width,), torch.float64)}

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        values = flatten_maps(maps, point).double()
        for part in self.parts[point.name]:
            index = to_device_of(torch.tensor(part), maps)
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
        out.append(nuclear_norm(grams))
    return nuclear_norm(whole) - torch.cat(out)


def nuclear_norm(gram: Tensor) -> Tensor:
    """Nuclear norm of a matrix from its Gram matrix (..., m, m)."""
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum(-1)

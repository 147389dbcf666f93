"""CHIP: channel independence, the loss of nuclear norm when a channel's maps are set to zero.

Sui, Yin, Xie, Phan, Zonouz, Yuan: CHIP: CHannel Independence-based Pruning for Compact Neural Networks, NeurIPS 2021,
section 3:

    CI_i = 1/N sum over images n of (||A^(n)||_* - ||M_i A^(n)||_*),    A^(n) (C, H W)

A^(n) holds the maps of one channel group as a convolution consumes them, and M_i sets row i to zero. It needs
calibration images; no labels, no gradients.
"""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from dist_prune.methods import base
from dist_prune.methods.needs import Needs
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
    """Channels whose maps are nearly linear combinations of the others go first."""

    paper = "Sui et al., CHIP: CHannel Independence-based Pruning for Compact Neural Networks, NeurIPS 2021"
    needs = Needs(note="and a determinant for each channel and image")

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Compute the independence at the inputs of all consumers.

        Returns:
            For each consuming layer ``<layer>:in:independence``: (positions,) float64, the mean over images.
        """
        parts: dict[str, list[list[list[int]]]] = {}
        for group in context.graph.free:
            for point in map_consumers(context.graph, group):
                parts.setdefault(point.point.name, []).append(point.positions.tolist())
        tables = context.collect(consumer_points(context.graph, map_consumers), Independence(parts))
        return flatten_tables({name: {"independence": own["independence"].mean(0)} for name, own in tables.items()})

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        return sum_consumers(scores, graph, "independence", map_consumers)


class Independence(Statistic):
    """Independence of channels per image. State: ``independence`` (n, positions) float64.

    Args:
        parts: hook point name -> for each group that is read there, for each of its channels, the positions in the
            input. Each group is scored by itself. A channel's value is at its first position; the others are zero.
    """

    def __init__(self, parts: Mapping[str, list[list[list[int]]]]):
        self.parts = parts

    def states(self, point: HookPoint) -> dict[str, State]:
        return {"independence": State("rows", (point.width,), torch.float64)}

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        values = flatten_maps(maps, point).double()
        for positions in self.parts[point.name]:
            index = to_device_of(torch.tensor(positions), maps)
            by_image = torch.stack([independence(image[index].flatten(1)) for image in values])
            tables["independence"][ids[:, None], index[:, 0]] = by_image


def independence(image: Tensor) -> Tensor:
    """The loss of nuclear norm with each row set to zero, by eigenvalues of the smaller Gram matrix.

    Args:
        image: (C, P) float64, the maps of one image.

    Returns:
        (C,) float64.
    """
    count, positions = image.shape
    channels = torch.arange(count, device=image.device)
    if positions < count:
        full, side = image.T @ image, positions
    else:
        full, side = image @ image.T, count
    norms = []
    for zeroed in channels.split(max(1, BUDGET // side**2)):
        grams = full.repeat(len(zeroed), 1, 1)
        if positions < count:
            grams -= image[zeroed, :, None] * image[zeroed, None, :]
        else:
            numbers = torch.arange(len(zeroed), device=image.device)
            grams[numbers, zeroed, :] = 0
            grams[numbers, :, zeroed] = 0
        norms.append(nuclear_norm(grams))
    return nuclear_norm(full) - torch.cat(norms)


def nuclear_norm(gram: Tensor) -> Tensor:
    """The nuclear norm of matrices, from their Gram matrices.

    Args:
        gram: (..., m, m) symmetric, floating point.

    Returns:
        (...) of the same dtype.
    """
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum(-1)

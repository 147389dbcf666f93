"""Curvature of the loss at the weights, per filter: squared gradients (empirical Fisher), or Hutchinson's estimate.

Both are for sites of side "weight". A row belongs to the micro-batch that begins with its image, and to its mean loss.
"""

from abc import abstractmethod
from collections.abc import MutableMapping

import torch
from torch import Tensor

from dist_prune.pruning.graph.groups import HookPoint
from dist_prune.pruning.hooks.statistics import State, Statistic
from dist_prune.pruning.rng import seeded_generator


class FilterStatistic(Statistic):
    """States: ``rows`` (n, C) float64, a sum over each filter's weights per micro-batch; ``batches``."""

    def states(self, point: HookPoint) -> dict[str, State]:
        return {"rows": State("rows", (point.width,), torch.float64), "batches": State("sum")}

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        assert grads is not None
        each = self.per_weight(point, maps.double(), grads.double() / len(ids), ids)
        tables["rows"][ids[:1]] = each.flatten(1).sum(1)[None]  # ids[0] would be read on the host
        tables["batches"] += 1

    @abstractmethod
    def per_weight(self, point: HookPoint, weight: Tensor, grads: Tensor, ids: Tensor) -> Tensor:
        """What is summed, one value per weight."""


class SquaredChange(FilterStatistic):
    """(g w)^2, g the gradient of the mean loss: the first-order change, and twice OBD's saliency by the Fisher."""

    def per_weight(self, point: HookPoint, weight: Tensor, grads: Tensor, ids: Tensor) -> Tensor:
        return (weight * grads).square()


class FirstOrderChange(FilterStatistic):
    """g w: the row of a filter is its whole first-order change."""

    def per_weight(self, point: HookPoint, weight: Tensor, grads: Tensor, ids: Tensor) -> Tensor:
        return weight * grads


class Hutchinson(FilterStatistic):
    """v (H v), whose mean over v of random signs is the diagonal of H; with ``scaled`` times w^2.

    The signs come from (seed, site, first image): other ones for each micro-batch, the same on any rank. H is that of
    all sites' weights together.
    """

    def __init__(self, seed: int, scaled: bool):
        self.seed, self.scaled = seed, scaled

    def direction(self, point: HookPoint, maps: Tensor, ids: Tensor) -> Tensor:
        generator = seeded_generator(self.seed, "signs", point.name, _first(ids))
        signs = torch.randint(2, maps.shape, generator=generator, dtype=torch.int8)
        return (2 * signs - 1).to(maps.device, maps.dtype, non_blocking=True)

    def per_weight(self, point: HookPoint, weight: Tensor, grads: Tensor, ids: Tensor) -> Tensor:
        own = self.direction(point, weight, ids) * grads
        return own * weight.square() if self.scaled else own


_asked: list[tuple[Tensor, int]] = []  # the last micro-batch's ids, and the first of them


def _first(ids: Tensor) -> int:
    """The first id, read from the device once a micro-batch and not for every site."""
    if not _asked or _asked[0][0] is not ids:
        _asked[:] = [(ids, int(ids[0]))]
    return _asked[0][1]


def mean_rows(tables: MutableMapping[str, Tensor], power: int = 1) -> Tensor:
    """(C,) mean of the rows (or of a power of them) over the micro-batches, added in their order."""
    return tables["rows"].pow(power).sum(0) / int(tables["batches"])

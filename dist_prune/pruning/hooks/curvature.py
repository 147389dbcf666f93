"""Curvature of the loss at the weights, per filter: squared gradients (empirical Fisher), or Hutchinson's estimate.

Both are for hook points of side ``weight``. A row is of the mean loss of the micro-batch whose first image has its
position; other rows stay zero.
"""

from abc import abstractmethod
from collections.abc import MutableMapping

import torch
from torch import Tensor

from dist_prune.pruning.graph.groups import HookPoint
from dist_prune.pruning.hooks.statistics import State, Statistic
from dist_prune.pruning.rng import seeded_generator


class FilterStatistic(Statistic):
    """A sum over each filter's weights, for every micro-batch.

    States: ``rows`` (n, C) float64, one row per micro-batch; ``batches`` () int64, the number of micro-batches.
    """

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
        """Compute the values that are summed, of the shape of ``weight``.

        Args:
            point: a hook point of side ``weight``.
            weight: (C, in, ...) float64.
            grads: gradient of the mean loss (or the Hessian product), of the shape of ``weight``.
            ids: (N,) positions of the images in the calibration list.
        """


class SquaredChange(FilterStatistic):
    """(g w)^2, g the gradient of the mean loss: the first-order change, and twice OBD's saliency by the Fisher."""

    def per_weight(self, point: HookPoint, weight: Tensor, grads: Tensor, ids: Tensor) -> Tensor:
        return (weight * grads).square()


class FirstOrderChange(FilterStatistic):
    """g w, g the gradient of the mean loss: the row of a filter is its total first-order change."""

    def per_weight(self, point: HookPoint, weight: Tensor, grads: Tensor, ids: Tensor) -> Tensor:
        return weight * grads


class Hutchinson(FilterStatistic):
    """v (H v), whose mean over vectors v of random signs is the diagonal of the Hessian H; with ``scaled`` times w^2.

    The signs are drawn from (seed, hook point, first image): they differ between micro-batches and do not depend on the
    rank. H is the Hessian with respect to the weights of all hook points together.
    """

    def __init__(self, seed: int, scaled: bool):
        self.seed, self.scaled = seed, scaled

    def direction(self, point: HookPoint, maps: Tensor, ids: Tensor) -> Tensor:
        generator = seeded_generator(self.seed, "signs", point.name, _first(ids))
        signs = torch.randint(2, maps.shape, generator=generator, dtype=torch.int8)
        return (2 * signs - 1).to(maps.device, maps.dtype, non_blocking=True)

    def per_weight(self, point: HookPoint, weight: Tensor, grads: Tensor, ids: Tensor) -> Tensor:
        diagonal = self.direction(point, weight, ids) * grads
        return diagonal * weight.square() if self.scaled else diagonal


_last_ids: list[tuple[Tensor, int]] = []  # the last micro-batch's ids, and the first of them


def _first(ids: Tensor) -> int:
    """Return the first id, read from the device once per micro-batch and not for every hook point."""
    if not _last_ids or _last_ids[0][0] is not ids:
        _last_ids[:] = [(ids, int(ids[0]))]
    return _last_ids[0][1]


def mean_rows(tables: MutableMapping[str, Tensor], power: int = 1) -> Tensor:
    """Average the rows over the micro-batches, added in their order.

    Args:
        tables: the tables of a ``FilterStatistic`` at one hook point.
        power: power that every entry is raised to before.

    Returns:
        (C,) float64.
    """
    return tables["rows"].pow(power).sum(0) / int(tables["batches"])

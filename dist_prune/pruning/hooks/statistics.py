"""A statistic of layer outputs that merges exactly, whatever the number of ranks.

A statistic declares named states; each has a zero and a merge word. ``update`` is local. Non-linear steps (ratio,
square root, threshold) belong after the merge, in the method.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import HookPoint

Reduction = Literal["sum", "max", "min", "rows"]
Bucket = tuple[Reduction, torch.dtype]


@dataclass(frozen=True)
class State:
    """One named table of a statistic.

    ``sum``, ``max`` and ``min`` merge entry by entry. ``rows`` is a table whose first axis is the position of the
    sample in the calibration list: each sample writes its own row, once, on one rank. Sums are of integers, because a
    sum of floats depends on how the images were dealt; floats go to ``rows`` and are added in order after the merge.
    """

    reduce: Reduction
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.int64

    def __post_init__(self):
        if self.reduce == "sum" and self.dtype.is_floating_point:
            raise ValueError("a 'sum' state holds integers: a float sum depends on the sharding. Use 'rows'.")

    def zero(self, images: int, device: torch.device | None = None) -> Tensor:
        """The identity of the merge; ``rows`` gets one row for each of ``images``."""
        if self.reduce == "rows":
            return torch.zeros((images, *self.shape), dtype=self.dtype, device=device)
        if self.reduce == "sum":
            return torch.zeros(self.shape, dtype=self.dtype, device=device)
        info = torch.finfo(self.dtype) if self.dtype.is_floating_point else torch.iinfo(self.dtype)
        start = info.min if self.reduce == "max" else info.max
        return torch.full(self.shape, start, dtype=self.dtype, device=device)


class Statistic(ABC):
    """What is gathered at a site; stateless, the tables live in a Accumulator."""

    @abstractmethod
    def states(self, point: HookPoint) -> Mapping[str, State]:
        """The tables of one site."""

    @abstractmethod
    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        """Add one micro-batch to the tables, in place.

        Args:
            point: where the maps come from.
            tables: state name -> table, on the device of the maps.
            maps: the site's raw output (or input), (N, C, H, W) or (N, C); at a site of side "weight" its weight.
            ids: (N,) positions of the images in the calibration list.
            grads: gradient of the summed loss with respect to ``maps`` where the bench was asked for gradients.
        """

    def direction(self, point: HookPoint, maps: Tensor, ids: Tensor) -> Tensor | None:
        """A vector of the shape of ``maps``: then ``grads`` is the Hessian's product with the vectors of all sites.

        The Hessian is that of the summed loss with respect to the maps of all sites together.
        """
        return None


def gradients(
    loss: Tensor, seen: Sequence[tuple[HookPoint, Tensor]], statistic: Statistic, ids: Tensor
) -> Sequence[Tensor]:
    """What ``update`` gets as ``grads``: of ``loss`` at each of the ``seen`` maps, of second order where asked for."""
    maps = [value for _, value in seen]
    with torch.no_grad():
        found = [statistic.direction(point, value, ids) for point, value in seen]
    vectors = [vector for vector in found if vector is not None]
    if not vectors:
        return torch.autograd.grad(loss, maps)
    first = torch.autograd.grad(loss, maps, create_graph=True)
    inner = torch.stack([(g * v).sum() for g, v in zip(first, vectors, strict=True)]).sum()
    try:
        return torch.autograd.grad(inner, maps)
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        raise PruneError(
            f"this method needs second derivatives, and torch has none for a layer of this network ({error}). "
            "Choose a criterion of first order, taylor or obd with squared gradients for example."
        ) from error


class Accumulator:
    """The tables of one statistic at many sites, and how two of them merge."""

    def __init__(self, statistic: Statistic, points: Sequence[HookPoint], images: int, device: torch.device):
        self.statistic, self.points, self.images, self.device = statistic, tuple(points), images, device
        self.tables: dict[str, dict[str, Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        """Every table back to the identity of its merge."""
        self.tables = {
            point.name: {k: s.zero(self.images, self.device) for k, s in self.statistic.states(point).items()}
            for point in self.points
        }

    def update(self, point: HookPoint, maps: Tensor, ids: Tensor, grads: Tensor | None = None) -> None:
        self.statistic.update(point, self.tables[point.name], maps, ids, grads)

    def reduction_buckets(self) -> dict[Bucket, list[Tensor]]:
        """The tables by merge word and dtype, in a fixed order: what one collective each can merge."""
        out: dict[Bucket, list[Tensor]] = {}
        for point in self.points:
            for name, state in self.statistic.states(point).items():
                out.setdefault((state.reduce, state.dtype), []).append(self.tables[point.name][name])
        return out

    def merge(self, other: "Accumulator") -> None:
        """Fold another tally of the same shape into this one."""
        theirs = other.reduction_buckets()
        for bucket, tables in self.reduction_buckets().items():
            for mine, table in zip(tables, theirs[bucket], strict=True):
                merge_(bucket[0], mine, table)

    def state_dict(self) -> dict[str, Tensor]:
        """``site:state`` -> table, for an artifact."""
        return {f"{site}:{name}": table for site, tables in self.tables.items() for name, table in tables.items()}

    def load_state_dict(self, flat: Mapping[str, Tensor]) -> None:
        """Take the tables of ``flat()``."""
        for site, tables in self.tables.items():
            for name in tables:
                tables[name] = flat[f"{site}:{name}"].to(self.device)


def merge_(word: Reduction, mine: Tensor, other: Tensor) -> None:
    """Merge ``other`` into ``mine`` in place by the merge word."""
    if word in ("sum", "rows"):
        mine.add_(other)
    elif word == "max":
        torch.maximum(mine, other, out=mine)
    else:
        torch.minimum(mine, other, out=mine)

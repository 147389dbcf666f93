"""Statistics of layer outputs that merge exactly, independent of the number of ranks.

A statistic declares named states; each has a shape, a dtype and a reduction. ``update`` is local to a rank. Non-linear
steps (ratio, square root, threshold) belong after the merge, in the method.
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
    """Declaration of one named table of a statistic: how it starts and how it merges over ranks.

    ``sum``, ``max`` and ``min`` merge entry by entry. ``rows`` is a table whose first axis is the position of the image
    in the calibration list: each image's row is written once, on one rank. Sums are of integers, because a sum of
    floats depends on how the images are distributed over ranks; floats go to ``rows`` and are added in order after the
    merge. Examples: ``State("sum", (64,))`` counts per channel, ``State("rows", (64,), torch.float64)`` holds a value
    per image and channel.

    Attributes:
        reduce: ``sum``, ``max``, ``min`` or ``rows``.
        shape: shape of the table; for ``rows`` of one row, without the image axis.
        dtype: dtype of the table; an integer dtype for ``sum``.

    Raises:
        ValueError: a ``sum`` state of a floating-point dtype.
    """

    reduce: Reduction
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.int64

    def __post_init__(self):
        if self.reduce == "sum" and self.dtype.is_floating_point:
            raise ValueError("a 'sum' state holds integers: a float sum depends on the sharding. Use 'rows'.")

    def zero(self, images: int, device: torch.device | None = None) -> Tensor:
        """Make a table with the identity of the reduction in every entry.

        Args:
            images: images of the calibration list, the number of rows of a ``rows`` table.
            device: where the table is made; None: torch's default device.
        """
        if self.reduce == "rows":
            return torch.zeros((images, *self.shape), dtype=self.dtype, device=device)
        if self.reduce == "sum":
            return torch.zeros(self.shape, dtype=self.dtype, device=device)
        info = torch.finfo(self.dtype) if self.dtype.is_floating_point else torch.iinfo(self.dtype)
        start = info.min if self.reduce == "max" else info.max
        return torch.full(self.shape, start, dtype=self.dtype, device=device)


class Statistic(ABC):
    """What is collected at hook points. It holds options only; the tables are in an ``Accumulator``.

    A subclass declares its tables in ``states`` and adds micro-batches to them in ``update``::

        class ZeroCounts(Statistic):
            def states(self, point):
                return {"zeros": State("sum", (point.width,))}

            def update(self, point, tables, maps, ids, grads):
                tables["zeros"] += (flatten_maps(maps, point) == 0).sum((0, 2))
    """

    @abstractmethod
    def states(self, point: HookPoint) -> Mapping[str, State]:
        """Declare the tables of one hook point: state name -> state."""

    @abstractmethod
    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        """Add one micro-batch to the tables, in place.

        Args:
            point: the hook point of ``maps``.
            tables: state name -> table, on the device of ``maps``.
            maps: the layer's raw output (or input), (N, C, H, W), (N, C) or (N, tokens, C); at a hook point of side
                ``weight`` the layer's weight, (out, in, ...). Heads and conv groups come folded (``fold_units``).
            ids: (N,) int64 positions of the images in the calibration list, on the device of ``maps``.
            grads: gradient of the summed loss with respect to ``maps``, of the same shape; None if the caller did not
                ask for a backward pass.
        """

    def direction(self, point: HookPoint, maps: Tensor, ids: Tensor) -> Tensor | None:
        """Return a vector to multiply the Hessian with, or None for first-order gradients.

        If it returns a vector of the shape of ``maps``, then the ``grads`` of ``update`` are the product of the Hessian
        with the vectors of all hook points. The Hessian is that of the summed loss with respect to the maps of all hook
        points together. The arguments are those of ``update``.
        """
        return None


def gradients(
    loss: Tensor, seen: Sequence[tuple[HookPoint, Tensor]], statistic: Statistic, ids: Tensor
) -> Sequence[Tensor]:
    """Compute the ``grads`` of ``Statistic.update`` for one micro-batch.

    Args:
        loss: () summed loss of the micro-batch, with its autograd graph.
        seen: (hook point, maps) pairs that the loss was computed from.
        statistic: decides by its ``direction`` whether the gradients are of second order.
        ids: (N,) positions of the images in the calibration list.

    Returns:
        One tensor for each pair, of the shape of its maps; zeros where the loss does not read them (a head that is not
        measured).

    Raises:
        PruneError: second derivatives are needed and torch has none for a layer of the network.
    """
    maps = [value for _, value in seen]
    with torch.no_grad():
        directions = [statistic.direction(point, value, ids) for point, value in seen]
    vectors = [vector for vector in directions if vector is not None]
    if not vectors:
        return torch.autograd.grad(loss, maps, materialize_grads=True)
    first = torch.autograd.grad(loss, maps, create_graph=True, materialize_grads=True)
    inner = torch.stack([(g * v).sum() for g, v in zip(first, vectors, strict=True)]).sum()
    try:
        return torch.autograd.grad(inner, maps, materialize_grads=True)
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        raise PruneError(
            f"this method needs second derivatives, and torch has none for a layer of this network ({error}). "
            "Choose a criterion of first order, taylor or obd with squared gradients for example."
        ) from error


class Accumulator:
    """The tables of one statistic at many hook points; two accumulators of the same shapes merge exactly.

    Attributes:
        statistic: the statistic that declares and updates the tables.
        points: the hook points.
        images: images of the calibration list, the number of rows of ``rows`` tables.
        device: device of the tables.
        tables: hook point name -> state name -> table.
    """

    def __init__(self, statistic: Statistic, points: Sequence[HookPoint], images: int, device: torch.device):
        self.statistic = statistic
        self.points = tuple(points)
        self.images = images
        self.device = device
        self.tables: dict[str, dict[str, Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        """Set every table back to the identity of its reduction."""
        self.tables = {
            point.name: {k: s.zero(self.images, self.device) for k, s in self.statistic.states(point).items()}
            for point in self.points
        }

    def update(self, point: HookPoint, maps: Tensor, ids: Tensor, grads: Tensor | None = None) -> None:
        """Add one micro-batch at one hook point; the arguments are those of ``Statistic.update``."""
        self.statistic.update(point, self.tables[point.name], maps, ids, grads)

    def reduction_buckets(self) -> dict[Bucket, list[Tensor]]:
        """Sort the tables by reduction and dtype, in a fixed order; one collective can merge each bucket."""
        buckets: dict[Bucket, list[Tensor]] = {}
        for point in self.points:
            for name, state in self.statistic.states(point).items():
                buckets.setdefault((state.reduce, state.dtype), []).append(self.tables[point.name][name])
        return buckets

    def merge(self, other: "Accumulator") -> None:
        """Merge another accumulator of the same statistic and hook points into this one, in place."""
        other_buckets = other.reduction_buckets()
        for bucket, tables in self.reduction_buckets().items():
            for table, other_table in zip(tables, other_buckets[bucket], strict=True):
                merge_(bucket[0], table, other_table)

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``<hook point>:<state>`` -> table, for an artifact."""
        return {f"{point}:{name}": table for point, tables in self.tables.items() for name, table in tables.items()}

    def load_state_dict(self, flat: Mapping[str, Tensor]) -> None:
        """Load the tables of ``state_dict()``; entries of other names are ignored."""
        for point, tables in self.tables.items():
            for name in tables:
                tables[name] = flat[f"{point}:{name}"].to(self.device)


def merge_(reduction: Reduction, table: Tensor, other: Tensor) -> None:
    """Merge ``other`` into ``table``, in place."""
    if reduction in ("sum", "rows"):
        table.add_(other)
    elif reduction == "max":
        torch.maximum(table, other, out=table)
    else:
        torch.minimum(table, other, out=table)

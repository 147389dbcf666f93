"""Second moments of what a layer reads, as a statistic: patches of a convolution, features of a linear layer."""

from collections.abc import Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dist_prune.pruning.graph.groups import HookPoint
from dist_prune.pruning.hooks.consumers import flatten_maps
from dist_prune.pruning.hooks.statistics import State, Statistic
from dist_prune.pruning.repair.second_moments import CHUNK, add_exactly

MOST_COLUMNS = 2304  # above it the taps of a kernel are taken apart


class InputMoments(Statistic):
    """Sums of products of the inputs that an output position reads.

    The columns are (channel, tap) with the taps of a channel together. A convolution of more than ``MOST_COLUMNS``
    columns has one column per channel instead: products of the same tap of two channels, over all positions.

    States: ``xx`` (2, D, D), ``x`` (2, D) and ``n`` (2, 1), the integer parts of exact sums (``add_exactly``).

    Attributes:
        kernels: hook point -> (kh, kw); (1, 1) of linear layers.
            The default of an absent one is (1, 1): one column per channel.
        positions: hook point -> output positions per image, which tell a convolution's stride and padding.
        maps: hook point of a linear layer -> entries of each flattened map, the inputs of one channel side by side.
            They then count as positions, and the channel has one column.
    """

    def __init__(
        self,
        kernels: Mapping[str, tuple[int, int]],
        positions: Mapping[str, int],
        maps: Mapping[str, int] = MappingProxyType({}),
    ):
        self.kernels, self.positions, self.maps = dict(kernels), dict(positions), dict(maps)

    def taps(self, point: HookPoint) -> int:
        """Columns of each channel of a hook point."""
        kh, kw = self.kernels.get(point.name, (1, 1))
        return kh * kw if point.width * kh * kw <= MOST_COLUMNS else 1

    def columns(self, point: HookPoint) -> int:
        """Columns of a hook point, D."""
        return point.width // self.maps.get(point.name, 1) * self.taps(point)

    def states(self, point: HookPoint) -> dict[str, State]:
        columns = self.columns(point)
        shapes: dict[str, tuple[int, ...]] = {"xx": (2, columns, columns), "x": (2, columns), "n": (2, 1)}
        return {name: State("sum", shape) for name, shape in shapes.items()}

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        sums: dict[str, Tensor] = {}
        each = max(1, CHUNK // (maps[0].numel() * self.taps(point)))
        for piece in maps.split(each):
            columns = self._columns(point, piece)  # (n, D, positions)
            x = columns.transpose(0, 1).flatten(1).double()
            count = torch.tensor([float(x.shape[1])], dtype=torch.float64, device=x.device)
            found = {"xx": x @ x.T, "x": x.sum(1), "n": count}
            sums = {name: sums[name] + value for name, value in found.items()} if sums else found
        for name, value in sums.items():
            add_exactly(tables[name], value)

    def _columns(self, point: HookPoint, maps: Tensor) -> Tensor:
        if point.name in self.maps:
            return maps.reshape(len(maps), self.columns(point), -1)
        kernel = self.kernels.get(point.name)
        if kernel is None or maps.dim() != 4 or self.taps(point) < kernel[0] * kernel[1]:
            return flatten_maps(maps, point)
        padding, stride = window(maps.shape[2:], kernel, self.positions[point.name])
        if kernel == (1, 1):
            return maps[:, :, ::stride, ::stride].flatten(2)
        return functional.unfold(maps, kernel, 1, padding, stride)


def window(size: Any, kernel: tuple[int, int], positions: int) -> tuple[tuple[int, int], int]:
    """The padding and stride with which a kernel gives a number of output positions.

    Padding of half the kernel is tried first, then none. If neither fits, padding of half the kernel and stride 1.

    Args:
        size: (H, W) of the input.
        kernel: (kh, kw).
        positions: output positions per image.
    """
    half = (kernel[0] // 2, kernel[1] // 2)
    for padding in (half, (0, 0)):
        for stride in range(1, 9):
            sides = [(s + 2 * p - k) // stride + 1 for s, p, k in zip(size, padding, kernel, strict=True)]
            if sides[0] * sides[1] == positions:
                return padding, stride
    return half, 1

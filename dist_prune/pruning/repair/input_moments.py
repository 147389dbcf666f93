"""Second moments of what a layer reads, as a statistic: patches of a convolution, features of a linear layer."""

from collections.abc import Mapping, MutableMapping
from types import MappingProxyType

import torch
from torch import Tensor

from dist_prune.pruning.graph.groups import HookPoint
from dist_prune.pruning.graph.window import Window
from dist_prune.pruning.hooks.consumers import flatten_maps
from dist_prune.pruning.hooks.statistics import State, Statistic
from dist_prune.pruning.repair.second_moments import add_parts, check_range

CHUNK = 2**22  # entries of the float64 rows that are multiplied at once
MOST_COLUMNS = 2304  # above it the taps of a kernel are taken apart


class InputMoments(Statistic):
    """Sums of products of the inputs that an output position reads.

    The columns are (channel, tap) with the taps of a channel together. A convolution of more than ``MOST_COLUMNS``
    columns has one column per channel instead: products of the same tap of two channels, over all positions.

    States: ``xx`` (2, D, D), ``x`` (2, D) and ``n`` (2, 1), the integer parts of exact sums (``add_parts``).

    Attributes:
        windows: hook point -> the window of its convolution. An absent one has one column per channel.
        maps: hook point of a linear layer -> entries of each flattened map, the inputs of one channel side by side.
            They then count as positions, and the channel has one column.
    """

    def __init__(
        self, windows: Mapping[str, Window] = MappingProxyType({}), maps: Mapping[str, int] = MappingProxyType({})
    ):
        self.windows, self.maps = dict(windows), dict(maps)

    def taps(self, point: HookPoint) -> int:
        """Columns of each channel of a hook point."""
        taps = self.windows[point.name].taps if point.name in self.windows else 1
        return taps if point.width * taps <= MOST_COLUMNS else 1

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
            x = self._columns(point, piece)
            count = torch.full((1,), x.shape[1], dtype=torch.float64, device=x.device)
            found = {"xx": x @ x.T, "x": x.sum(1), "n": count}
            sums = {name: sums[name] + value for name, value in found.items()} if sums else found
        check_range(sums["xx"])  # a sum out of range has a sum of squares out of range: one answer to wait for
        for name, value in sums.items():
            add_parts(tables[name], value)

    def _columns(self, point: HookPoint, maps: Tensor) -> Tensor:
        """(D, rows) float64."""
        if point.name in self.maps:
            return maps.reshape(len(maps), self.columns(point), -1).transpose(0, 1).flatten(1).double()
        window = self.windows.get(point.name)
        if window is None or maps.dim() != 4 or self.taps(point) < window.taps:
            return flatten_maps(maps, point).transpose(0, 1).flatten(1).double()
        return window.read(maps).flatten(0, 1).flatten(1)

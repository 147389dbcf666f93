"""Where the channels of a group are read behind norm, activation and sum, and what is read there."""

from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dist_prune.pruning.graph.channel_tensors import to_device_of
from dist_prune.pruning.graph.groups import ChannelGroup, Coupling, DependencyGraph, HookPoint
from dist_prune.pruning.hooks.consumers import ChannelPoint, consumers, flatten_maps, producers
from dist_prune.pruning.hooks.statistics import State, Statistic


def group_inputs(graph: DependencyGraph, group: ChannelGroup) -> list[ChannelPoint]:
    """The tensors in which the group's channels are consumed: one of a plain layer, one a block of a residual stream.

    What enters a layer has passed norm, activation and sum. An average pool is read at its entrance, before it pools;
    a maximum pool is not a layer here, and the convolution behind it is read. Layers that read the same tensor are
    told apart only by their values (see ``distinct``).
    """
    readers = consumers(graph, group, pools=True)
    pools = [point for point in readers if point.point.kind == "pool"]
    if pools:  # what a linear layer reads behind them is the same, averaged
        readers = [point for point in readers if point.point.kind != "linear"]
    return (pools or readers)[:1] if len(group.producers) == 1 else readers


def group_outputs(graph: DependencyGraph, group: ChannelGroup) -> list[ChannelPoint]:
    """The output of the layer that makes the group's channels, before norm and activation; of a residual stream, which
    is no layer's output, what ``group_inputs`` finds."""
    return group_inputs(graph, group) if len(group.producers) > 1 else producers(graph, group)


def pooled_norm(graph: DependencyGraph, group: ChannelGroup) -> Coupling | None:
    """The norm that reads a group behind a pool, where there is one and it alone: conv, pool, activation, norm."""
    norms = [coupling for coupling in group.couplings if graph.layers[coupling.layer].kind == "norm"]
    if len(norms) != 1 or len(group.producers) != 1:
        return None
    behind = graph.layers[norms[0].layer].positions < graph.layers[group.producers[0]].positions
    return norms[0] if behind else None


def distinct(tables: Sequence[Tensor]) -> list[int]:
    """Numbers of the tables that none before them is equal to."""
    out: list[int] = []
    for number, table in enumerate(tables):
        if not any(tables[other].shape == table.shape and torch.equal(tables[other], table) for other in out):
            out.append(number)
    return out


def memory_batches(
    taps: Mapping[str, Sequence[ChannelPoint]], statistic: "Activations", images: int, batch: int, memory_mb: int
) -> list[list[str]]:
    """Groups whose activations, and whose kernels in batches of ``batch`` images, fit in the memory together."""
    out: list[list[str]] = []
    room = 0.0
    for name, found in taps.items():
        size = sum(4.0 * images * statistic.states(tap.point)["maps"].zero(1).numel() for tap in found)
        size += 8.0 * images // batch * batch * batch * sum(tap.width for tap in found)
        if not out or room < size:
            out.append([])
            room = memory_mb * 2.0**20
        out[-1].append(name)
        room -= size
    return out


class ActivationCensus(Statistic):
    """What passes a site. States, int64: ``shape`` (3,), the maps' C, h, w (C, d, 1 of tokens); ``zeros`` (C,) and
    ``numbers`` (), how many numbers per channel were zero, and how many there were."""

    def states(self, point: HookPoint) -> dict[str, State]:
        return {"shape": State("max", (3,)), "zeros": State("sum", (point.width,)), "numbers": State("sum")}

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        flat = flatten_maps(maps, point)
        shape = maps.shape[1:] if maps.dim() == 4 else (*flat.shape[1:], 1)
        tables["shape"] = torch.maximum(tables["shape"], to_device_of(torch.tensor(shape), maps))
        tables["zeros"] += (flat == 0).sum((0, 2))
        tables["numbers"] += flat.shape[2] * len(flat)


class Activations(Statistic):
    """Maps of every image. State: ``maps`` (n, C, d) float32 rows.

    Args:
        shapes: site name -> (C, h, w), of the census.
        side: maps that are larger are averaged to this side; None: never.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], side: int | None = None):
        self.shapes, self.side = shapes, side

    def sides(self, point: HookPoint) -> tuple[int, int]:
        """Height and width of the maps that are held."""
        _, height, width = self.shapes[point.name]
        if self.side is None or width == 1:
            return height, width
        return min(height, self.side), min(width, self.side)

    def states(self, point: HookPoint) -> dict[str, State]:
        height, width = self.sides(point)
        return {"maps": State("rows", (self.shapes[point.name][0], height * width), torch.float32)}

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        if maps.dim() == 4 and tuple(maps.shape[2:]) != self.sides(point):
            maps = functional.adaptive_avg_pool2d(maps, self.sides(point))
        tables["maps"][ids] = flatten_maps(maps, point).to(torch.float32)


class ChannelMeans(Statistic):
    """One number per channel and image: the mean over positions (section 3). State: ``means`` (n, C)."""

    def states(self, point: HookPoint) -> dict[str, State]:
        return {"means": State("rows", (point.width,), torch.float32)}

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        if point.kind == "conv":
            means = maps.flatten(2).mean(2)
        else:  # (N, F), or features last behind tokens
            means = maps.flatten(1, -2).mean(1) if maps.dim() > 2 else maps
        tables["means"][ids] = means.to(torch.float32)

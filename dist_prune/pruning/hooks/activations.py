"""Activations of a group's channels after norm, activation and addition: their hook points and statistics."""

from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dist_prune.pruning.graph.channel_tensors import to_device_of
from dist_prune.pruning.graph.groups import ChannelGroup, Coupling, DependencyGraph, HookPoint
from dist_prune.pruning.hooks.consumers import ChannelPoint, consumers, flatten_maps, producers
from dist_prune.pruning.hooks.statistics import State, Statistic


def group_inputs(graph: DependencyGraph, group: ChannelGroup) -> list[ChannelPoint]:
    """Return the tensors in which the group's channels are consumed: one, or on a residual stream one per block.

    The input of a layer has passed norm, activation and addition. An average pool is read at its input. A maximum pool
    is not a layer here: the convolution after it is read. Only their values tell whether two layers read the same
    tensor (see ``distinct``).
    """
    readers = consumers(graph, group, pools=True)
    pools = [point for point in readers if point.point.kind == "pool"]
    if pools:  # a linear layer after them reads the same maps, averaged
        readers = [point for point in readers if point.point.kind != "linear"]
    return (pools or readers)[:1] if len(group.producers) == 1 else readers


def group_outputs(graph: DependencyGraph, group: ChannelGroup) -> list[ChannelPoint]:
    """Return the output of the layer that makes the group's channels, before norm and activation.

    A residual stream is no layer's output: for a group of several producers it returns ``group_inputs``.
    """
    return group_inputs(graph, group) if len(group.producers) > 1 else producers(graph, group)


def pooled_norm(graph: DependencyGraph, group: ChannelGroup) -> Coupling | None:
    """Return the norm that reads a group after a pool (conv, pool, activation, norm), or None.

    The group has to have one producer and one norm, and the norm has to run on smaller maps than the producer.
    """
    norms = [coupling for coupling in group.couplings if graph.layers[coupling.layer].kind == "norm"]
    if len(norms) != 1 or len(group.producers) != 1:
        return None
    pooled = graph.layers[norms[0].layer].positions < graph.layers[group.producers[0]].positions
    return norms[0] if pooled else None


def distinct(tables: Sequence[Tensor]) -> list[int]:
    """Return the positions of the tensors that equal no earlier one in shape and values."""
    numbers: list[int] = []
    for number, table in enumerate(tables):
        if not any(tables[other].shape == table.shape and torch.equal(tables[other], table) for other in numbers):
            numbers.append(number)
    return numbers


def memory_batches(
    points: Mapping[str, Sequence[ChannelPoint]], statistic: "Activations", images: int, batch: int, memory_mb: int
) -> list[list[str]]:
    """Split groups into lists whose activations and kernels fit in the memory together.

    Args:
        points: group -> the points where its channels are read.
        statistic: the statistic that collects the activations.
        images: number of calibration images.
        batch: images of one kernel matrix, (batch, batch) float64 per channel.
        memory_mb: memory in MiB; a single group may exceed it.
    """
    batches: list[list[str]] = []
    free = 0.0
    for name, group_points in points.items():
        size = sum(4.0 * images * statistic.states(point.point)["maps"].zero(1).numel() for point in group_points)
        size += 8.0 * images // batch * batch * batch * sum(point.width for point in group_points)
        if not batches or free < size:
            batches.append([])
            free = memory_mb * 2.0**20
        batches[-1].append(name)
        free -= size
    return batches


class ActivationCensus(Statistic):
    """Shapes and zeros of the maps at a hook point.

    States, int64: ``shape`` (3,), C, h and w of the maps (C, d and 1 for tokens); ``zeros`` (C,), the count of zeros
    per channel; ``numbers`` (), the count of values per channel.
    """

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
        shapes: hook point name -> (C, h, w), the ``shape`` state of ``ActivationCensus``.
        side: larger maps are averaged to this height and width; None: never.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], side: int | None = None):
        self.shapes, self.side = shapes, side

    def sides(self, point: HookPoint) -> tuple[int, int]:
        """Return the height and width of the maps that are stored."""
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
    """Mean over positions per channel and image (MINT, section 3). State: ``means`` (n, C) float32 rows."""

    def states(self, point: HookPoint) -> dict[str, State]:
        return {"means": State("rows", (point.width,), torch.float32)}

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        if point.kind == "conv":
            means = maps.flatten(2).mean(2)
        else:  # (N, F), or features last after tokens
            means = maps.flatten(1, -2).mean(1) if maps.dim() > 2 else maps
        tables["means"][ids] = means.to(torch.float32)

"""Channels times numbers while a network runs: masks, switches and learned scales are one gate.

A channel that is zero at all of its consumers, after every norm, activation, pool and addition, is a removed one.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from dist_prune.pruning.graph.channel_tensors import to_device_of
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.capture import capture_outputs
from dist_prune.pruning.hooks.consumers import ChannelPoint, consumers, producers

Where = Literal["consumed", "output"]


def gate_points(graph: DependencyGraph, group: str, where: Where = "consumed") -> list[ChannelPoint]:
    """The hook points that gate a group.

    Args:
        group: its name.
        where: ``consumed``: the inputs of the convolutions and linear layers that read it. ``output``: the raw outputs
            of the layers that make it; a batch norm after them still adds its shift.
    """
    return (consumers if where == "consumed" else producers)(graph, graph.group(group))


@contextmanager
def gate(model: nn.Module, points: Iterable[ChannelPoint], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Run ``model`` with the channels at hook points times values; the hooks are gone afterwards.

    Args:
        points: hook points of one or several groups (``gate_points``).
        values: group -> (C,), or (m, C): a row for each of m equal parts of the batch, in order (m = 1: all of it; m =
            batch: a row per image). bool: what is False becomes exactly zero, whatever it was, infinities included.
            Floating point: factors, in the dtype of what they are multiplied with; gradients flow to them.
    """
    with ExitStack() as hooks:
        for point in points:

            def times(_site: object, maps: Tensor, point: ChannelPoint = point) -> Tensor:
                return _gated(maps, values[point.point.group], point)

            hooks.enter_context(capture_outputs(model, [point.point], times))
        yield


def gate_off(
    model: nn.Module, graph: DependencyGraph, removed: Mapping[str, Iterable[int]]
) -> AbstractContextManager[None]:
    """Run ``model`` as if the channels ``removed[group]`` were gone: a gate of zeros at their consumers."""
    stays = {}
    for name, gone in removed.items():
        stays[name] = torch.ones(graph.group(name).width, dtype=torch.bool)
        stays[name][list(gone)] = False
    return gate(model, [point for name in removed for point in gate_points(graph, name)], stays)


def _gated(maps: Tensor, values: Tensor, point: ChannelPoint) -> Tensor:
    assert values.shape[-1] == point.width, f"{values.shape[-1]} values for the {point.width} channels at {point.point}"
    values = values.to(maps.device, maps.dtype if values.is_floating_point() else None, non_blocking=True)
    if not point.in_order:
        values = torch.cat([values, values.new_ones((*values.shape[:-1], 1))], -1)[..., to_device_of(point.slots, maps)]
    if values.dim() == 1:
        values = values[None]
    elif len(values) not in (1, len(maps)):
        values = values.repeat_interleave(len(maps) // len(values), 0)
    between = [1] * (maps.dim() - 2)
    last = point.point.kind == "linear"
    values = values.view(len(values), *between, -1) if last else values.view(len(values), -1, *between)
    return maps * values if values.is_floating_point() else torch.where(values, maps, 0)

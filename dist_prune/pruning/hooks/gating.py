"""Gates: channels multiplied by numbers while a network runs. Masks and learned scales are gates.

A channel that is zero at all of its consumers, after every norm, activation, pool and addition, counts as removed. A
norm over channels computes over those that are left (gated_norms.py), and so does the standardisation of a weight
(gated_convs.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from dist_prune.pruning.graph.channel_tensors import to_device_of
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.graph.standardised_convs import is_standardised
from dist_prune.pruning.hooks.capture import capture_outputs
from dist_prune.pruning.hooks.consumers import ChannelPoint, consumers, input_point, producers
from dist_prune.pruning.hooks.gated_convs import gated_conv
from dist_prune.pruning.hooks.gated_norms import gated_norm

Where = Literal["consumed", "output"]


def gate_points(graph: DependencyGraph, group: str, where: Where = "consumed") -> list[ChannelPoint]:
    """Return the hook points at which a group is gated.

    Args:
        graph: the network's dependency graph.
        group: name of the channel group.
        where: ``consumed``: the inputs of the convolutions and linear layers that read it. ``output``: the raw outputs
            of the layers that make it; a batch norm after them still adds its shift.

    Returns:
        The points; last the inputs of the norms over channels that the group runs through.
    """
    named = graph.group(group)
    norms = [c for c in named.couplings if graph.layers[c.layer].kind == "layer norm"]
    points = (consumers if where == "consumed" else producers)(graph, named)
    return points + [input_point(graph, named, coupling) for coupling in norms]


@contextmanager
def gate(model: nn.Module, points: Iterable[ChannelPoint], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Run ``model`` with the channels at hook points multiplied by values; the hooks are removed afterwards.

    Args:
        model: the network that the hook points are of.
        points: hook points of one or several groups (``gate_points``).
        values: group -> (C,), or (m, C): a row for each of m equal parts of the batch, in order (m = 1: for the whole
            batch; m = batch: a row per image). bool: False makes a channel exactly zero, also if it holds infinities.
            Floating point: factors, cast to the dtype of the maps; gradients flow to them.
    """
    norms: dict[str, list[ChannelPoint]] = {}
    convs: dict[str, list[ChannelPoint]] = {}
    with ExitStack() as hooks:
        for point in points:
            if point.point.kind == "layer norm":
                norms.setdefault(point.point.layer, []).append(point)
                continue
            if _reads_standardised(model, point):
                convs.setdefault(point.point.layer, []).append(point)
                continue

            def multiply(_point: object, maps: Tensor, point: ChannelPoint = point) -> Tensor:
                return _apply_gate(maps, values[point.point.group], point)

            hooks.enter_context(capture_outputs(model, [point.point], multiply))
        for layer, there in norms.items():
            hooks.enter_context(gated_norm(model, layer, [_rows_at(point, values) for point in there]))
        for layer, there in convs.items():
            hooks.enter_context(gated_conv(model, layer, [_rows_at(point, values) for point in there]))
        yield


def gate_off(
    model: nn.Module, graph: DependencyGraph, removed: Mapping[str, Iterable[int]]
) -> AbstractContextManager[None]:
    """Run ``model`` as if the channels ``removed[group]`` were removed: a gate of zeros at their consumers."""
    kept = {}
    for name, channels in removed.items():
        kept[name] = torch.ones(graph.group(name).width, dtype=torch.bool)
        kept[name][list(channels)] = False
    return gate(model, [point for name in removed for point in gate_points(graph, name)], kept)


def _reads_standardised(model: nn.Module, point: ChannelPoint) -> bool:
    """Whether a point is the input of a convolution that standardises its weight; grouped ones lose whole filters."""
    if point.point.side != "in" or point.point.kind != "conv":
        return False
    module = model.get_submodule(point.point.layer)
    return isinstance(module, nn.Conv2d) and is_standardised(module) and module.groups == 1


def _rows_at(point: ChannelPoint, values: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda maps: _rows(maps, values[point.point.group], point)


def _rows(maps: Tensor, values: Tensor, point: ChannelPoint) -> Tensor:
    """The values at each position of a point's tensor: (1, positions), or a row for each of ``maps``."""
    assert values.shape[-1] == point.width, f"{values.shape[-1]} values for the {point.width} channels at {point.point}"
    values = values.to(maps.device, maps.dtype if values.is_floating_point() else None, non_blocking=True)
    if not point.in_order:
        values = torch.cat([values, values.new_ones((*values.shape[:-1], 1))], -1)[..., to_device_of(point.slots, maps)]
    if values.dim() == 1:
        values = values[None]
    elif len(values) not in (1, len(maps)):
        values = values.repeat_interleave(len(maps) // len(values), 0)
    return values


def _apply_gate(maps: Tensor, values: Tensor, point: ChannelPoint) -> Tensor:
    values = _rows(maps, values, point)
    between = [1] * (maps.dim() - 2)
    last = point.point.kind == "linear"
    values = values.view(len(values), *between, -1) if last else values.view(len(values), -1, *between)
    return maps * values if values.is_floating_point() else torch.where(values, maps, 0)

"""Consumers and producers of a group's channels: hook points, with the positions of the channels there.

The input of a layer has passed every batch norm, activation and addition before it. Papers call it the feature maps
after the ReLU; on a residual stream there is one after every addition. Channels that are zero at all of their consumers
count as removed (gating.py), so a gradient there counts once however the layers in between are arranged.
"""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.channel_tensors import sum_by_channel, to_device_of
from dist_prune.pruning.graph.groups import ChannelGroup, Coupling, DependencyGraph, HookPoint
from dist_prune.pruning.hooks.statistics import State, Statistic

FindPoints = Callable[[DependencyGraph, ChannelGroup], list["ChannelPoint"]]


@dataclass(frozen=True)
class ChannelPoint:
    """A hook point, and the positions that the channels of one group take there.

    Attributes:
        point: the hook point; ``point.group`` is the group's name.
        coupling: position ``index[i]`` of the tensor belongs to channel ``channel[i]`` of the group.
        width: channels of the group, C.
    """

    point: HookPoint
    coupling: Coupling
    width: int

    @cached_property
    def positions(self) -> Tensor:
        """(C, m) int64: the positions of each channel, ascending. m is 1, or the size of a map that was flattened."""
        pairs = sorted(zip(self.coupling.channel, self.coupling.index, strict=True))
        return torch.tensor([position for _, position in pairs]).view(self.width, -1)

    @cached_property
    def slots(self) -> Tensor:
        """(point.width,) int64: the channel at each position; C at positions of other groups."""
        slots = torch.full((self.point.width,), self.width)
        slots[torch.tensor(self.coupling.index)] = torch.tensor(self.coupling.channel)
        return slots

    @cached_property
    def in_order(self) -> bool:
        """Whether position i is channel i, for all positions."""
        return torch.equal(self.slots, torch.arange(self.width))

    def take(self, maps: Tensor) -> Tensor:
        """Select the group's channels: maps (n, positions, d) of the hook point -> (n, C, m d)."""
        index = to_device_of(self.positions, maps)
        return maps[:, index.flatten()].reshape(len(maps), len(index), -1)


def consumers(
    graph: DependencyGraph, group: ChannelGroup, *, pools: bool = False, depthwise: bool = False
) -> list[ChannelPoint]:
    """Return the inputs of the layers that read the group's channels, in the order of the group's couplings.

    Convolutions and linear layers are readers. Batch norms and activations are not: they pass channels on. No layer
    reads queries and keys, but their product: the outputs of the keys stand for it, which are zero where both are gone.

    Args:
        graph: the network's dependency graph.
        group: one of its groups.
        pools: whether average pools count as readers as well.
        depthwise: whether depthwise convolutions count as readers as well.
    """
    points = []
    for coupling in group.couplings:
        layer = graph.layers[coupling.layer]
        if layer.kind == "pool":
            reads = pools
        elif layer.depthwise:  # its channels are recorded as its outputs
            reads = depthwise
        else:
            reads = coupling.side == "in" and layer.kind in ("conv", "linear")
        if reads:
            points.append(input_point(graph, group, coupling))
    if not points and group.unit == "head position":
        whole = group.couplings[0]
        half = len(whole.index) // 2
        keys = replace(whole, index=whole.index[half:], channel=whole.channel[half:])
        points = [replace(point, coupling=keys) for point in producers(graph, group)]
    return points


def producers(graph: DependencyGraph, group: ChannelGroup) -> list[ChannelPoint]:
    """Return the raw outputs of the convolutions and linear layers that make the group's channels."""
    points = []
    for coupling in group.couplings:
        layer = graph.layers[coupling.layer]
        if coupling.side == "out" and layer.kind in ("conv", "linear") and not layer.depthwise:
            point = HookPoint(layer.name, group.name, layer.width_out, layer.kind, layer.name == group.name)
            points.append(ChannelPoint(point, coupling, group.width))
    return points


def input_point(graph: DependencyGraph, group: ChannelGroup, coupling: Coupling) -> ChannelPoint:
    """Return the input of a coupling's layer, of any kind."""
    layer = graph.layers[coupling.layer]
    point = HookPoint(f"{layer.name}:in", group.name, layer.width_in, layer.kind, False, "in")
    return ChannelPoint(point, coupling, group.width)


def map_consumers(graph: DependencyGraph, group: ChannelGroup) -> list[ChannelPoint]:
    """Return the group's consumers that read feature maps: convolutions, or linear layers if there are none."""
    points = consumers(graph, group)
    return [point for point in points if point.point.kind == "conv"] or points


def consumer_points(graph: DependencyGraph, of: FindPoints = consumers) -> list[HookPoint]:
    """Return the hook points of all free groups, each once: a layer after a concatenation consumes several groups.

    Args:
        graph: the network's dependency graph.
        of: finds the points of one group, as ``consumers``, ``map_consumers`` and ``producers`` do.
    """
    return list({p.point.name: p.point for group in graph.free for p in of(graph, group)}.values())


def sum_consumers(
    scores: Mapping[str, Tensor], graph: DependencyGraph, state: str, of: FindPoints = consumers
) -> dict[str, Tensor]:
    """Sum tables per position over all consumers of each channel.

    Args:
        scores: ``<hook point>:<state>`` -> (..., positions), as ``flatten_tables`` names them.
        graph: the network's dependency graph.
        state: name of the statistic's state.
        of: finds the points of one group; the one that the tables were collected with.

    Returns:
        Free group -> (..., C).

    Raises:
        PruneError: a table is missing.
    """
    sums = {}
    for group in graph.free:
        tables = []
        for point in of(graph, group):
            if (name := f"{point.point.name}:{state}") not in scores:
                raise PruneError(f"the scores have no {name!r}: it was made by another method or network")
            tables.append(sum_by_channel(scores[name], point.coupling, group.width))
        sums[group.name] = torch.stack(tables).sum(0)
    return sums


def flatten_tables(tables: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Flatten hook point -> state -> table to ``<hook point>:<state>`` -> table."""
    return {f"{point}:{state}": table for point, states in tables.items() for state, table in states.items()}


def flatten_maps(maps: Tensor, point: HookPoint) -> Tensor:
    """Reshape inputs or outputs of a layer, (n, C, H, W), (n, C) or a linear layer's (n, tokens, C), to (n, C, d)."""
    if point.kind == "linear" and maps.dim() > 2:
        return maps.flatten(1, -2).transpose(1, 2)
    return maps.flatten(2) if maps.dim() > 2 else maps[:, :, None]


class GateGradient(Statistic):
    """Gradient of the loss with respect to a gate z = 1 on each channel: sum over positions of maps times gradient.

    States: ``gate`` (n, C) float64, the gradient of each image's own loss; with ``batches`` the gradient of each
    micro-batch's mean loss, in the row of its first image. ``batches`` () int64, the number of micro-batches.
    """

    def __init__(self, batches: bool):
        self.batches = batches

    def states(self, point: HookPoint) -> dict[str, State]:
        return {"gate": State("rows", (point.width,), torch.float64), "batches": State("sum")}

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        assert grads is not None
        gradient = (flatten_maps(maps, point).double() * flatten_maps(grads, point)).sum(2)
        tables["batches"] += 1
        if self.batches:  # added, because a layer may run several times in one pass: a head on several levels of maps
            tables["gate"][ids[:1]] += gradient.mean(0)[None]  # ids[0] would be read on the host
        else:
            tables["gate"][ids] += gradient

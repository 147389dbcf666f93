"""Which layers read a group's channels, and which make them: hook points, with the channels' positions there.

What enters a layer has passed every batch norm, activation and addition on its way: it is what papers call the feature
maps after the ReLU, and on a residual stream there is one after every addition. Channels that are zero at all of their
consumers are removed ones (gating.py), so a gradient there counts once however the layers in between are arranged.
"""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.pruning.channel_tensors import gathered, placed
from dist_prune.pruning.channels import ChannelGroup, Channels, Coupling, Site
from dist_prune.pruning.statistic import State, Statistic

Points = Callable[[Channels, ChannelGroup], list["ChannelPoint"]]


@dataclass(frozen=True)
class ChannelPoint:
    """A hook point, and the positions that a group's channels take there.

    Attributes:
        site: the hook point; ``site.group`` is the group's name.
        coupling: position ``index[i]`` of the site belongs to channel ``channel[i]`` of the group.
        width: channels of the group, C.
    """

    site: Site
    coupling: Coupling
    width: int

    @cached_property
    def positions(self) -> Tensor:
        """(C, m) int64, ascending: the positions of each channel. m is 1, or what flattening makes of a map."""
        pairs = sorted(zip(self.coupling.channel, self.coupling.index, strict=True))
        return torch.tensor([position for _, position in pairs]).view(self.width, -1)

    @cached_property
    def slots(self) -> Tensor:
        """(site.width,) int64: the channel at each position; C at positions of other groups."""
        slots = torch.full((self.site.width,), self.width)
        slots[torch.tensor(self.coupling.index)] = torch.tensor(self.coupling.channel)
        return slots

    @cached_property
    def in_order(self) -> bool:
        """Whether the positions are the channels, in order."""
        return torch.equal(self.slots, torch.arange(self.width))

    def take(self, maps: Tensor) -> Tensor:
        """(n, positions, d) of the site -> (n, C, m d) of the group."""
        index = placed(self.positions, maps)
        return maps[:, index.flatten()].reshape(len(maps), len(index), -1)


def consumers(
    channels: Channels, group: ChannelGroup, *, pools: bool = False, depthwise: bool = False
) -> list[ChannelPoint]:
    """The inputs of the layers that read the group's channels, in the order of the group's couplings.

    Convolutions and linear layers read; batch norms and activations only pass channels on.

    Args:
        pools: average pools read as well.
        depthwise: depthwise convolutions read as well.
    """
    points = []
    for coupling in group.couplings:
        layer = channels.layers[coupling.layer]
        if layer.kind == "pool":
            reads = pools
        elif layer.depthwise:  # its channels are recorded as its outputs
            reads = depthwise
        else:
            reads = coupling.side == "in" and layer.kind in ("conv", "linear")
        if reads:
            points.append(input_point(channels, group, coupling))
    return points


def producers(channels: Channels, group: ChannelGroup) -> list[ChannelPoint]:
    """The raw outputs of the convolutions and linear layers that make the group's channels."""
    points = []
    for coupling in group.couplings:
        layer = channels.layers[coupling.layer]
        if coupling.side == "out" and layer.kind in ("conv", "linear") and not layer.depthwise:
            site = Site(layer.name, group.name, layer.width_out, layer.kind, layer.name == group.name)
            points.append(ChannelPoint(site, coupling, group.width))
    return points


def input_point(channels: Channels, group: ChannelGroup, coupling: Coupling) -> ChannelPoint:
    """The input of a coupling's layer, of any kind."""
    layer = channels.layers[coupling.layer]
    site = Site(f"{layer.name}:in", group.name, layer.width_in, layer.kind, False, "in")
    return ChannelPoint(site, coupling, group.width)


def map_consumers(channels: Channels, group: ChannelGroup) -> list[ChannelPoint]:
    """The consumers that show the group's feature maps: convolutions; linear layers if there are no convolutions."""
    points = consumers(channels, group)
    return [point for point in points if point.site.kind == "conv"] or points


def consumer_sites(channels: Channels, of: Points = consumers) -> list[Site]:
    """The hook points of all free groups, each once: a layer after a concatenation consumes several groups."""
    return list({p.site.name: p.site for group in channels.free for p in of(channels, group)}.values())


def sum_consumers(
    scores: Mapping[str, Tensor], channels: Channels, state: str, of: Points = consumers
) -> dict[str, Tensor]:
    """Free group -> (..., C): the tables ``<site>:<state>``, (..., positions), summed over each channel's consumers.

    Raises:
        PruneError: a table is missing.
    """
    sums = {}
    for group in channels.free:
        parts = []
        for point in of(channels, group):
            if (name := f"{point.site.name}:{state}") not in scores:
                raise PruneError(f"the score file has no {name!r}: it was made by another method or network")
            parts.append(gathered(scores[name], point.coupling, group.width))
        sums[group.name] = torch.stack(parts).sum(0)
    return sums


def flatten_tables(tables: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Site -> state -> table as ``<site>:<state>`` -> table."""
    return {f"{site}:{state}": table for site, states in tables.items() for state, table in states.items()}


def flatten_maps(maps: Tensor, site: Site) -> Tensor:
    """Inputs or outputs of a layer, (n, C, H, W), (n, C) or a linear layer's (n, tokens, C), as (n, C, d)."""
    if site.kind == "linear" and maps.dim() > 2:
        return maps.flatten(1, -2).transpose(1, 2)
    return maps.flatten(2) if maps.dim() > 2 else maps[:, :, None]


class GateGradient(Statistic):
    """Gradient of the loss with respect to a gate z = 1 on each channel: sum over positions of maps times gradient.

    States: ``gate`` (n, C) float64: of each image's own loss, or with ``batches`` of each micro-batch's mean loss, in
    the row of its first image; ``batches``: how many micro-batches.
    """

    def __init__(self, batches: bool):
        self.batches = batches

    def states(self, site: Site) -> dict[str, State]:
        return {"gate": State("rows", (site.width,), torch.float64), "batches": State("sum")}

    def update(
        self, site: Site, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        assert grads is not None
        own = (flatten_maps(maps, site).double() * flatten_maps(grads, site)).sum(2)
        tables["batches"] += 1
        if self.batches:
            tables["gate"][ids[:1]] = own.mean(0)[None]  # ids[0] would be read on the host
        else:
            tables["gate"][ids] = own

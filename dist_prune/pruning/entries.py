"""Where a group's channels are consumed: behind every batch norm, activation and addition on their way.

A tap there sees what papers call the feature maps after the ReLU; on a residual stream there is one after every
addition. Switching a channel off in all of them is what surgery does (gates.py), so a gradient there counts once
however the layers in between are arranged.
"""

from collections.abc import Callable, Mapping, MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.pruning.channels import ChannelGroup, Channels, Coupling, Site
from dist_prune.pruning.combine import gathered
from dist_prune.pruning.statistic import State, Statistic

Of = Callable[[Channels, ChannelGroup], list["Entry"]]


class Entry(NamedTuple):
    """One layer that consumes a group: a tap on its whole input, and where the group's channels lie in it."""

    site: Site
    coupling: Coupling


def entries(channels: Channels, group: ChannelGroup) -> list[Entry]:
    """The convolutions and linear layers that consume the group's channels."""
    found = []
    for coupling in group.couplings:
        layer = channels.layers[coupling.layer]
        if coupling.side == "in" and layer.kind in ("conv", "linear") and not layer.depthwise:
            site = Site(f"{layer.name}:in", group.name, layer.width_in, layer.kind, False, "in")
            found.append(Entry(site, coupling))
    return found


def shown(channels: Channels, group: ChannelGroup) -> list[Entry]:
    """The entries that show the group's feature maps: those of convolutions; of linear layers where there are none."""
    found = entries(channels, group)
    return [entry for entry in found if entry.site.kind == "conv"] or found


def sites_of(channels: Channels, of: Of = entries) -> list[Site]:
    """The taps of all free groups, each once: a layer behind a concatenation consumes several groups."""
    return list({site.name: site for group in channels.free for site, _ in of(channels, group)}.values())


def per_group(scores: Mapping[str, Tensor], channels: Channels, state: str, of: Of = entries) -> dict[str, Tensor]:
    """Free group -> (..., C): the tables ``<tap>:<state>``, (..., positions), summed over the taps of each channel."""
    found = {}
    for group in channels.free:
        parts = []
        for site, coupling in of(channels, group):
            if (name := f"{site.name}:{state}") not in scores:
                raise PruneError(f"the score file has no {name!r}: it was made by another method or network")
            parts.append(gathered(scores[name], coupling, group.width))
        found[group.name] = torch.stack(parts).sum(0)
    return found


def flat(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Site -> state -> table as ``<site>:<state>`` -> table."""
    return {f"{site}:{state}": table for site, tables in found.items() for state, table in tables.items()}


def spread(maps: Tensor, site: Site) -> Tensor:
    """(N, C, positions) of a layer's input or output: convolutions (N, C, H, W); linear (N, C) or (N, tokens, C)."""
    if site.kind == "linear":
        return maps.reshape(len(maps), -1, maps.shape[-1]).transpose(1, 2)
    return maps.flatten(2)


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
        own = (spread(maps, site).double() * spread(grads, site)).sum(2)
        tables["batches"] += 1
        if self.batches:
            tables["gate"][ids[:1]] = own.mean(0)[None]  # ids[0] would be read on the host
        else:
            tables["gate"][ids] = own

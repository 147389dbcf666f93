"""Channels that cut blocks leave without an input or a reader: they are removed from the network, not only masked."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from dist_prune.pruning.blocks import left
from dist_prune.pruning.channels import ChannelGroup, Channels, Side
from dist_prune.pruning.choose import Request
from dist_prune.pruning.consumers import ChannelPoint, consumers, producers
from dist_prune.pruning.masks import block_mask
from dist_prune.pruning.plan import Plan


def promoted(plan: Plan, channels: Channels, request: Request) -> Plan:
    """The plan with every channel removed for real that nothing reaches any more, or that reaches nothing.

    That is a channel of a free group all of whose incoming blocks are cut in every layer that makes it, or all of
    whose outgoing ones in every layer that reads it; again, until no more are found. Floors and rounding of the request
    hold: where they ask for more channels, the first ones stay, masked. A channel that nothing reaches is a constant
    (its bias, or its batch norm's shift); with the channel the constant goes as well.
    """
    removed = {group: set(gone) for group, gone in plan.removed.items()}
    names = set(plan.blocks)
    grids = {n: block_mask(plan.blocks[n], channels.layers[n].width_out, channels.layers[n].width_in) for n in names}
    while True:
        stays = left(channels, removed)
        found = {}
        for group in channels.free:
            gone = removed.get(group.name, set())
            dead = set(_dead(group, channels, grids, stays)) - gone
            count = request.width(group, group.width - len(gone) - len(dead))
            spare = count - (group.width - len(gone) - len(dead))
            if dead := set(sorted(dead)[max(spare, 0) :]):
                found[group.name] = dead
        if not found:
            break
        for name, dead in found.items():
            removed.setdefault(name, set()).update(dead)
    whole = {name: tuple(sorted(gone)) for name, gone in removed.items()}
    reasons = {group: why for group, why in plan.reasons.items() if group not in whole}
    return Plan(whole, plan.widths, reasons, plan.blocks)


def _dead(
    group: ChannelGroup, channels: Channels, grids: Mapping[str, Tensor], stays: Mapping[tuple[str, Side], list[int]]
) -> Iterable[int]:
    """The group's channels whose incoming or whose outgoing blocks are all cut among what is left."""

    def dead(points: Sequence[ChannelPoint], other: Side) -> set[int]:
        unreached = []
        for point in points:
            grid, coupling = grids.get(point.site.layer), point.coupling
            if grid is None:
                return set()
            alive = (grid if other == "in" else grid.T)[:, stays[point.site.layer, other]].any(1).tolist()
            living = {c for i, c in zip(coupling.index, coupling.channel, strict=True) if alive[i]}
            unreached.append(set(coupling.channel) - living)
        return set.intersection(*unreached) if unreached else set()

    return dead(producers(channels, group), "in") | dead(consumers(channels, group), "out")

"""Channels that cut blocks leave without an input or a reader: they are removed from the network, not only masked."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph, Side
from dist_prune.pruning.hooks.consumers import ChannelPoint, consumers, producers
from dist_prune.pruning.plan.block_masks import block_mask
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.weight_blocks import remaining_positions
from dist_prune.pruning.selection.ranking import SelectionRequest


def promote_dead_channels(plan: Plan, graph: DependencyGraph, request: SelectionRequest) -> Plan:
    """The plan with every channel removed for real that nothing reaches any more, or that reaches nothing.

    That is a channel of a free group all of whose incoming blocks are cut in every layer that makes it, or all of
    whose outgoing ones in every layer that reads it; again, until no more are found. Floors and rounding of the request
    hold: where they ask for more channels, the first ones stay, masked. A channel that nothing reaches is a constant
    (its bias, or its batch norm's shift); with the channel the constant goes as well.
    """
    removed = {group: set(gone) for group, gone in plan.removed.items()}
    names = set(plan.blocks)
    grids = {n: block_mask(plan.blocks[n], graph.layers[n].width_out, graph.layers[n].width_in) for n in names}
    while True:
        stays = remaining_positions(graph, removed)
        found = {}
        for group in graph.free:
            gone = removed.get(group.name, set())
            dead = set(_dead(group, graph, grids, stays)) - gone
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
    group: ChannelGroup,
    graph: DependencyGraph,
    grids: Mapping[str, Tensor],
    stays: Mapping[tuple[str, Side], list[int]],
) -> Iterable[int]:
    """The group's channels whose incoming or whose outgoing blocks are all cut among what is left."""

    def dead(points: Sequence[ChannelPoint], other: Side) -> set[int]:
        unreached = []
        for point in points:
            grid, coupling = grids.get(point.point.layer), point.coupling
            if grid is None:
                return set()
            alive = (grid if other == "in" else grid.T)[:, stays[point.point.layer, other]].any(1).tolist()
            living = {c for i, c in zip(coupling.index, coupling.channel, strict=True) if alive[i]}
            unreached.append(set(coupling.channel) - living)
        return set.intersection(*unreached) if unreached else set()

    return dead(producers(graph, group), "in") | dead(consumers(graph, group), "out")

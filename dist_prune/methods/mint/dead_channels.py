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
    """Remove every channel that nothing reaches any more, or that reaches nothing.

    Such a channel belongs to a free group. All its incoming blocks are cut in every layer that makes it, or all its
    outgoing ones in every layer that reads it. The search repeats until it finds no more. Floors and rounding of the
    request hold: if they ask for more channels, the first ones stay, masked. A channel that nothing reaches is a
    constant (its bias, or its batch norm's shift); the constant is removed with the channel.

    Args:
        plan: the plan with the cut blocks.
        graph: of the dense network.
        request: floors and rounding of the groups' widths.

    Returns:
        A plan with the same blocks and the dead channels removed.
    """
    removed = {group: set(channels) for group, channels in plan.removed.items()}
    names = set(plan.blocks)
    grids = {n: block_mask(plan.blocks[n], graph.layers[n].width_out, graph.layers[n].width_in) for n in names}
    while True:
        remaining = remaining_positions(graph, removed)
        newly_dead = {}
        for group in graph.free:
            gone = removed.get(group.name, set())
            dead = set(_dead_channels(group, graph, grids, remaining)) - gone
            count = request.width(group, group.width - len(gone) - len(dead))
            spare = count - (group.width - len(gone) - len(dead))
            if dead := set(sorted(dead)[max(spare, 0) :]):
                newly_dead[group.name] = dead
        if not newly_dead:
            break
        for name, dead in newly_dead.items():
            removed.setdefault(name, set()).update(dead)
    all_removed = {name: tuple(sorted(channels)) for name, channels in removed.items()}
    reasons = {group: why for group, why in plan.reasons.items() if group not in all_removed}
    return Plan(all_removed, plan.widths, reasons, plan.blocks)


def _dead_channels(
    group: ChannelGroup,
    graph: DependencyGraph,
    grids: Mapping[str, Tensor],
    remaining: Mapping[tuple[str, Side], list[int]],
) -> Iterable[int]:
    """The group's channels whose incoming or whose outgoing blocks are all cut among the remaining positions."""

    def unused(points: Sequence[ChannelPoint], other: Side) -> set[int]:
        unused_at = []
        for point in points:
            grid, coupling = grids.get(point.point.layer), point.coupling
            if grid is None:
                return set()
            alive = (grid if other == "in" else grid.T)[:, remaining[point.point.layer, other]].any(1).tolist()
            used = {c for i, c in zip(coupling.index, coupling.channel, strict=True) if alive[i]}
            unused_at.append(set(coupling.channel) - used)
        return set.intersection(*unused_at) if unused_at else set()

    return unused(producers(graph, group), "in") | unused(consumers(graph, group), "out")

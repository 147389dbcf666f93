"""The dependency graph of a pruned network, computed from that of the dense one without a second trace."""

from collections.abc import Iterable
from dataclasses import replace

from dist_prune.pruning.graph.groups import ChannelGroup, Coupling, DependencyGraph, Side
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.weight_blocks import remaining_positions


def graph_after(graph: DependencyGraph, plan: Plan) -> DependencyGraph:
    """Derive the layers and groups of the network that ``plan`` leaves, with the names of the dense network.

    Channels are renumbered from 0. Protected groups stay protected, also those that the recipe or a method protects; a
    group with one channel left becomes protected.

    Args:
        graph: dependency graph of the dense network.
        plan: a plan in coordinates of the dense network.

    Returns:
        The graph, as tracing the pruned network would find it, with ``graph`` as its ``origin``; ``graph`` itself if
        the plan is empty.
    """
    if plan.empty:
        return graph
    graph.check_removable(plan.removed, plan.blocks_removed)
    widths, gone = graph.widths(plan.counts), graph.layers_gone(plan.counts)
    positions = remaining_positions(graph, plan.removed)
    layers = {}
    for name, layer in graph.layers.items():
        if name in gone:
            continue
        width_in, width_out = widths[name]
        groups = width_out * layer.groups // layer.width_out if layer.groups > 1 else 1  # whole groups are removed
        layers[name] = replace(layer, width_in=width_in, width_out=width_out, groups=groups)
    new = {side: {old: number for number, old in enumerate(kept)} for side, kept in positions.items()}
    groups = tuple(_prune_group(group, plan.kept(group.name), new, gone) for group in graph.groups)
    return replace(
        graph,
        layers=layers,
        groups=groups,
        origin=graph,
        other_params=graph.other_params - sum(b.other_params for b in graph.blocks if b.path in plan.blocks_removed),
        blocks=tuple(block for block in graph.blocks if block.path not in plan.blocks_removed),
    )


def _prune_group(
    group: ChannelGroup, kept: Iterable[int], new: dict[tuple[str, Side], dict[int, int]], gone: set[str]
) -> ChannelGroup:
    """Return the group with only the channels ``kept``, its positions renumbered by ``new``, without layers ``gone``.

    Tracing can give protected groups positions that no layer has (after splits and concatenations): they are left out.
    """
    order = {channel: number for number, channel in enumerate(kept)}
    couplings = []
    for c in group.couplings:
        if c.layer in gone:
            continue
        renumbered = new[c.layer, c.side]
        pairs = [(i, ch) for i, ch in zip(c.index, c.channel, strict=True) if i in renumbered or not group.protected]
        kept_pairs = [(i, order[ch]) for i, ch in pairs if ch in order]
        couplings.append(
            Coupling(c.layer, c.side, tuple(renumbered[i] for i, _ in kept_pairs), tuple(n for _, n in kept_pairs))
        )
    why = group.protected or (f"it has a single {group.unit}" if len(order) == 1 else "")
    why = why if couplings or not group.couplings else "its block is removed"
    producers = tuple(name for name in group.producers if name not in gone) if couplings else group.producers
    return replace(
        group, width=len(order), producers=producers, couplings=tuple(couplings), protected=why,
        gone=group.width - len(order),
    )  # fmt: skip

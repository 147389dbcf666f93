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
    graph.check_removable(plan.removed)
    widths = graph.widths(plan.counts)
    positions = remaining_positions(graph, plan.removed)
    layers = {}
    for name, layer in graph.layers.items():
        width_in, width_out = widths[name]
        groups = width_out * layer.groups // layer.width_out if layer.groups > 1 else 1  # whole groups are removed
        layers[name] = replace(layer, width_in=width_in, width_out=width_out, groups=groups)
    new = {side: {old: number for number, old in enumerate(kept)} for side, kept in positions.items()}
    groups = tuple(_prune_group(group, plan.kept(group.name), new) for group in graph.groups)
    return replace(graph, layers=layers, groups=groups, origin=graph)


def _prune_group(group: ChannelGroup, kept: Iterable[int], new: dict[tuple[str, Side], dict[int, int]]) -> ChannelGroup:
    """Return the group with only the channels ``kept``, its positions renumbered by ``new``.

    Tracing can give protected groups positions that no layer has (after splits and concatenations): they are left out.
    """
    order = {channel: number for number, channel in enumerate(kept)}
    couplings = []
    for c in group.couplings:
        renumbered = new[c.layer, c.side]
        pairs = [(i, ch) for i, ch in zip(c.index, c.channel, strict=True) if i in renumbered or not group.protected]
        kept_pairs = [(i, order[ch]) for i, ch in pairs if ch in order]
        couplings.append(
            Coupling(c.layer, c.side, tuple(renumbered[i] for i, _ in kept_pairs), tuple(n for _, n in kept_pairs))
        )
    why = group.protected or (f"it has a single {group.unit}" if len(order) == 1 else "")
    return replace(group, width=len(order), couplings=tuple(couplings), protected=why, gone=group.width - len(order))

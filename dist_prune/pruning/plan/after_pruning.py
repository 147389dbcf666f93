"""What can be cut of a network that a plan has cut already: the dense network's channels, by arithmetic."""

from collections.abc import Iterable
from dataclasses import replace

from dist_prune.pruning.graph.groups import ChannelGroup, Coupling, DependencyGraph, Side
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.weight_blocks import remaining_positions


def graph_after(graph: DependencyGraph, plan: Plan) -> DependencyGraph:
    """The layers and groups of the network that ``plan`` leaves, as tracing it would find them; names stay.

    A group of which one channel is left is protected. Exclusions and a method's limits stay as well: they were said of
    the dense network, which ``origin`` of the result is.

    Args:
        graph: of the dense network.
        plan: in dense coordinates.
    """
    if plan.empty:
        return graph
    widths, places = graph.widths(plan.counts), remaining_positions(graph, plan.removed)
    layers = {}
    for name, layer in graph.layers.items():
        width_in, width_out = widths[name]
        groups = width_out * layer.groups // layer.width_out if layer.groups > 1 else 1  # they go whole
        layers[name] = replace(layer, width_in=width_in, width_out=width_out, groups=groups)
    new = {at: {old: now for now, old in enumerate(positions)} for at, positions in places.items()}
    groups = tuple(_cut(group, plan.kept(group.name), new) for group in graph.groups)
    return replace(graph, layers=layers, groups=groups, origin=graph)


def _cut(group: ChannelGroup, kept: Iterable[int], new: dict[tuple[str, Side], dict[int, int]]) -> ChannelGroup:
    """The group with the channels ``kept``, and with the positions that are left of those that it lies in.

    Tracing can give protected groups positions that no layer has (behind splits and concatenations): they are left out.
    """
    order = {channel: number for number, channel in enumerate(kept)}
    couplings = []
    for c in group.couplings:
        places = new[c.layer, c.side]
        pairs = [(i, ch) for i, ch in zip(c.index, c.channel, strict=True) if i in places or not group.protected]
        stays = [(i, order[ch]) for i, ch in pairs if ch in order]
        couplings.append(Coupling(c.layer, c.side, tuple(places[i] for i, _ in stays), tuple(n for _, n in stays)))
    why = group.protected or (f"it has a single {group.unit}" if len(order) == 1 else "")
    return replace(group, width=len(order), couplings=tuple(couplings), protected=why, gone=group.width - len(order))

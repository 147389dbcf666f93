"""The exchange format of the redundancy-graph authors: {layer: {saved_idxs, mask_num}}, in module order.

``saved_idxs`` are the kept filters of a scored layer, ``mask_num`` is the number of its removed filters. Scored layers
are the leaders of free groups; layers that follow a leader have no entry.
"""

from collections.abc import Mapping
from typing import Any

from dist_prune.errors import PruneError, nearest, shown
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
from dist_prune.pruning.plan.plan import Plan


def to_saved_idxs(plan: Plan, graph: DependencyGraph) -> dict[str, dict[str, Any]]:
    """Return the plan as pruning information, with an entry for every free group that a convolution leads.

    Raises:
        PruneError: the plan removes heads or conv groups, which the format cannot express.
    """
    units = [group.name for group in graph.free if group.unit != "channel" and group.name in plan.removed]
    if units:
        raise PruneError(
            f"{units[0]} and {len(units) - 1} other groups lose whole heads or conv groups, "
            "and saved_idxs are filters: write the plan itself (--out plan.json)"
        )
    kept = {group.name: plan.kept(group.name) for group in _scored_groups(graph)}
    return {name: {"saved_idxs": idxs, "mask_num": plan.widths[name] - len(idxs)} for name, idxs in kept.items()}


def from_saved_idxs(body: Mapping[str, Any], graph: DependencyGraph) -> Plan:
    """Make the plan of pruning information.

    Args:
        body: layer -> ``{"saved_idxs": [...], "mask_num": n}``. The names are those of this network, or the entries are
            its scored layers in order (as the authors rebuild their networks).
        graph: dependency graph of the dense network.

    Raises:
        PruneError: layers, widths or indices do not fit the network.
    """
    scored = _scored_groups(graph)
    names = [group.name for group in scored]
    if not all(name in names for name in body):
        _check_order(body, graph, names)
        body = dict(zip(names, body.values(), strict=True))
    missing = [name for name in names if name not in body]
    if missing:
        raise PruneError(
            f"the pruning information misses {len(missing)} of the network's {len(names)} scored layers, among them "
            f"{missing[0]!r}: it belongs to another network (a layer that keeps everything has an entry too)"
        )
    kept = {group.name: _parse_entry(body[group.name], group) for group in scored}
    return Plan.from_kept(graph, kept, dict.fromkeys(names, "the pruning information keeps all of it"))


def _scored_groups(graph: DependencyGraph) -> list[ChannelGroup]:
    return [g for g in graph.free if graph.layers[g.name].kind == "conv" and g.unit == "channel"]


def _check_order(body: Mapping[str, Any], graph: DependencyGraph, names: list[str]) -> None:
    """Raise PruneError if entries with other names cannot be this network's scored layers in their order."""
    if len(body) == len(names) and not any(name in names for name in body):
        return
    unknown = next(name for name in body if name not in names)
    leader = next((group.name for group in graph.groups if unknown in group.layers), None)
    hint = f" It follows {leader!r}." if leader else nearest(unknown, names)
    raise PruneError(
        f"the pruning information names {unknown!r}, which is no scored layer of this network.{hint} It has "
        f"{len(body)} entries; the network has {len(names)} scored layers, from {names[0]!r} to {names[-1]!r} "
        "('dist-prune check RECIPE' lists them). Entries of other names are taken in order if the numbers agree."
    )


def _parse_entry(entry: Any, group: ChannelGroup) -> list[int]:
    try:
        saved, mask_num = [int(index) for index in entry["saved_idxs"]], int(entry["mask_num"])
    except (KeyError, TypeError, ValueError) as error:
        raise PruneError(
            f"{group.name}: an entry is {{'saved_idxs': [...], 'mask_num': n}}, not {shown(entry)}"
        ) from error
    legal = len(set(saved)) == len(saved) > 0 and all(0 <= index < group.width for index in saved)
    if not legal or len(saved) + mask_num != group.width:
        raise PruneError(
            f"{group.name}: {len(saved)} saved and {mask_num} removed filters do not fit a layer of {group.width}: the "
            "pruning information belongs to another network, or an index is doubled or out of range"
        )
    return sorted(saved)

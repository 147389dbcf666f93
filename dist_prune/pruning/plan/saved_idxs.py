"""Pruning information as the redundancy-graph authors exchange it: {layer: {saved_idxs, mask_num}}, in module order.

``saved_idxs`` are a scored layer's kept filters, ``mask_num`` is the number of its removed ones; followers have none.
"""

from collections.abc import Mapping
from typing import Any

from dist_prune.errors import PruneError, nearest, shown
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
from dist_prune.pruning.plan.plan import Plan


def to_saved_idxs(plan: Plan, graph: DependencyGraph) -> dict[str, dict[str, Any]]:
    """The plan as pruning information: every group that may be cut and that a convolution leads.

    Raises:
        PruneError: the plan takes whole units, which the form cannot say.
    """
    whole = [group.name for group in graph.free if group.unit != "channel" and group.name in plan.removed]
    if whole:
        raise PruneError(
            f"{whole[0]} and {len(whole) - 1} other groups lose whole heads or conv groups, "
            "and saved_idxs are filters: write the plan itself (--out plan.json)"
        )
    kept = {group.name: plan.kept(group.name) for group in _scored(graph)}
    return {name: {"saved_idxs": stays, "mask_num": plan.widths[name] - len(stays)} for name, stays in kept.items()}


def from_saved_idxs(body: Mapping[str, Any], graph: DependencyGraph) -> Plan:
    """The plan of pruning information. Its names are this network's, or its entries are the scored layers in order
    (as the authors rebuild their networks).

    Raises:
        PruneError: layers, widths or indices that do not fit the network.
    """
    scored = _scored(graph)
    names = [group.name for group in scored]
    if not all(name in names for name in body):
        _in_order(body, graph, names)
        body = dict(zip(names, body.values(), strict=True))
    missing = [name for name in names if name not in body]
    if missing:
        raise PruneError(
            f"the pruning information misses {len(missing)} of the network's {len(names)} scored layers, among them "
            f"{missing[0]!r}: it belongs to another network (a layer that keeps everything has an entry too)"
        )
    kept = {group.name: _kept(body[group.name], group) for group in scored}
    return Plan.from_kept(graph, kept, dict.fromkeys(names, "the pruning information keeps all of it"))


def _scored(graph: DependencyGraph) -> list[ChannelGroup]:
    return [g for g in graph.free if graph.layers[g.name].kind == "conv" and g.unit == "channel"]


def _in_order(body: Mapping[str, Any], graph: DependencyGraph, names: list[str]) -> None:
    """PruneError where entries with other names cannot be this network's scored layers in their order."""
    if len(body) == len(names) and not any(name in names for name in body):
        return
    unknown = next(name for name in body if name not in names)
    leader = next((group.name for group in graph.groups if unknown in group.layers), None)
    hint = f" It follows {leader!r}." if leader else nearest(unknown, names)
    raise PruneError(
        f"the pruning information names {unknown!r}, which is no scored layer of this network.{hint} It has "
        f"{len(body)} entries; the network has {len(names)} scored layers, from {names[0]!r} to {names[-1]!r} "
        "('dist-prune check RECIPE' lists them). Entries of other names are taken in order where the numbers agree."
    )


def _kept(entry: Any, group: ChannelGroup) -> list[int]:
    try:
        stays, gone = [int(index) for index in entry["saved_idxs"]], int(entry["mask_num"])
    except (KeyError, TypeError, ValueError) as error:
        raise PruneError(
            f"{group.name}: an entry is {{'saved_idxs': [...], 'mask_num': n}}, not {shown(entry)}"
        ) from error
    legal = len(set(stays)) == len(stays) > 0 and all(0 <= index < group.width for index in stays)
    if not legal or len(stays) + gone != group.width:
        raise PruneError(
            f"{group.name}: {len(stays)} saved and {gone} removed filters do not fit a layer of {group.width}: the "
            "pruning information belongs to another network, or an index is doubled or out of range"
        )
    return sorted(stays)

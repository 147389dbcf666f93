"""The exchange format of the redundancy-graph authors: {layer: {saved_idxs, mask_num}}, in module order.

``saved_idxs`` are the kept filters of a scored layer, ``mask_num`` is the number of its removed filters. Scored layers
are the leaders of free groups; layers that follow a leader have no entry.
"""

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from dist_prune.errors import PruneError, nearest, shown
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
from dist_prune.pruning.plan.plan import Plan

Say = Callable[[str], None]


def to_saved_idxs(
    plan: Plan, graph: DependencyGraph, names: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Return the plan as pruning information, with an entry for every free group that a convolution leads.

    Args:
        plan: for the network that ``graph`` was traced on.
        graph: dependency graph of the dense network.
        names: layer -> its name in the file, for layers that have another one there.

    Raises:
        PruneError: the plan removes heads, conv groups or residual blocks, which the format cannot express.
    """
    if plan.blocks_removed:
        raise PruneError(
            f"{plan.blocks_removed[0]!r} and {len(plan.blocks_removed) - 1} other residual blocks go as a whole, and "
            "saved_idxs are filters: write the plan itself (--out plan.json)"
        )
    units = [group.name for group in graph.free if group.unit != "channel" and group.name in plan.removed]
    if units:
        raise PruneError(
            f"{units[0]} and {len(units) - 1} other groups lose whole heads or conv groups, "
            "and saved_idxs are filters: write the plan itself (--out plan.json)"
        )
    kept = {group.name: plan.kept(group.name) for group in _scored_groups(graph)}
    return {
        (names or {}).get(name, name): {"saved_idxs": idxs, "mask_num": plan.widths[name] - len(idxs)}
        for name, idxs in kept.items()
    }


def from_saved_idxs(body: Mapping[str, Any], graph: DependencyGraph, say: Say = lambda text: None) -> Plan:
    """Make the plan of pruning information.

    Args:
        body: layer -> ``{"saved_idxs": [...], "mask_num": n}``. Names are matched exactly, then by a suffix that only
            one layer has, then by their place in the order if numbers and widths agree.
        graph: dependency graph of the dense network.
        say: called with a line that shows the layers that were matched under other names.

    Raises:
        PruneError: layers, widths or indices do not fit the network.
    """
    scored = {group.name: group for group in _scored_groups(graph)}
    match = _match_layers(body, scored, graph)
    if renamed := [f"{theirs} -> {ours}" for theirs, ours in match.items() if theirs != ours]:
        exact = len(match) - len(renamed)
        say(
            f"pruning information: {exact} of {len(match)} layers have the network's names; "
            f"matched by suffix or order: {', '.join(renamed)}"
        )
    kept = {ours: _parse_entry(body[theirs], scored[ours]) for theirs, ours in match.items()}
    return Plan.from_kept(graph, kept, dict.fromkeys(scored, "the pruning information keeps all of it"))


def _scored_groups(graph: DependencyGraph) -> list[ChannelGroup]:
    return [g for g in graph.free if graph.layers[g.name].kind == "conv" and g.unit == "channel"]


def _match_layers(
    body: Mapping[str, Any], scored: Mapping[str, ChannelGroup], graph: DependencyGraph
) -> dict[str, str]:
    """Name in the file -> scored layer, in the file's order.

    Raises:
        PruneError: entries are left over on either side, or those that remain differ in width.
    """
    match = {name: name for name in body if name in scored}
    theirs, ours = ([name for name in names if name not in match] for names in (body, scored))
    fits = {name: _by_suffix(name, ours) for name in theirs}
    taken = Counter(fits.values())
    match |= {name: other for name, other in fits.items() if other and taken[other] == 1}
    found = set(match.values())
    theirs, ours = [name for name in theirs if name not in match], [name for name in ours if name not in found]
    followed = next((name for name in theirs if _leader(name, graph)), None)
    if len(theirs) != len(ours) or followed:
        raise _leftover_error(body, scored, graph, theirs, ours)
    places, own_places = list(body), list(scored)
    for name, own in zip(theirs, ours, strict=True):
        width, likely = _width(body[name]), nearest(name, [other for other in ours if other != name])
        if places.index(name) != own_places.index(own):
            raise PruneError(
                f"the pruning information names {name!r}, which is no scored layer of this network.{likely} It is "
                f"entry {places.index(name) + 1} of the file, and the layer without an entry, {own!r}, is number "
                f"{own_places.index(own) + 1} of the network: they are not taken for each other"
            )
        if width is not None and width != scored[own].width:
            raise PruneError(
                f"the pruning information names {name!r}, which is no scored layer of this network; by order it is "
                f"{own!r}, which has {scored[own].width} filters and not {width}: it belongs to another network"
            )
        match[name] = own
    return {name: match[name] for name in body}


def _by_suffix(name: str, others: list[str]) -> str:
    """The one other path that shares the longest end, where one of two paths is the end of the other; else empty."""
    ends = {o: min(len(o), len(name)) for o in others if f".{name}".endswith(f".{o}") or f".{o}".endswith(f".{name}")}
    longest = [other for other, length in ends.items() if length == max(ends.values())]
    return longest[0] if len(longest) == 1 else ""


def _width(entry: Any) -> int | None:
    """The width of the layer that an entry is for; None for an entry that ``_parse_entry`` refuses."""
    try:
        return len(entry["saved_idxs"]) + operator.index(entry["mask_num"])
    except (KeyError, TypeError, ValueError):
        return None


def _leader(name: str, graph: DependencyGraph) -> str | None:
    return next((group.name for group in graph.groups if name in group.layers), None)


def _leftover_error(
    body: Mapping[str, Any], scored: Mapping[str, Any], graph: DependencyGraph, theirs: list[str], ours: list[str]
) -> PruneError:
    names = list(scored)
    if not theirs:
        return PruneError(
            f"the pruning information misses {len(ours)} of the network's {len(names)} scored layers, among them "
            f"{ours[0]!r}: it belongs to another network (a layer that keeps everything has an entry too)"
        )
    unknown = next((name for name in theirs if _leader(name, graph)), theirs[0])
    leader = _leader(unknown, graph)
    hint = f" It follows {leader!r}." if leader else nearest(unknown, names)
    return PruneError(
        f"the pruning information names {unknown!r}, which is no scored layer of this network.{hint} It has "
        f"{len(body)} entries; the network has {len(names)} scored layers, from {names[0]!r} to {names[-1]!r} "
        "('dist-prune check RECIPE' lists them). Entries of other names are taken in order if numbers and widths agree."
    )


def _parse_entry(entry: Any, group: ChannelGroup) -> list[int]:
    try:
        saved = [operator.index(index) for index in entry["saved_idxs"]]  # refuses 1.9 and "1"
        mask_num = operator.index(entry["mask_num"])
    except (KeyError, TypeError, ValueError) as error:
        raise PruneError(
            f"{group.name}: an entry is {{'saved_idxs': [...], 'mask_num': n}} of whole numbers, not {shown(entry)}"
        ) from error
    legal = len(set(saved)) == len(saved) > 0 and all(0 <= index < group.width for index in saved)
    if not legal or len(saved) + mask_num != group.width:
        raise PruneError(
            f"{group.name}: {len(saved)} saved and {mask_num} removed filters do not fit a layer of {group.width}: the "
            "pruning information belongs to another network, or an index is doubled or out of range"
        )
    return sorted(saved)

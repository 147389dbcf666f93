"""The sizes that a plan leaves, per channel group and of the whole network, as numbers and as text."""

from typing import Any

from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.cost import COSTS


def summarize_plan(plan: Plan, graph: DependencyGraph) -> dict[str, Any]:
    """Summarize a plan for JSON: widths of each group, and costs of the whole network before and after.

    Args:
        plan: a plan in coordinates of the dense network.
        graph: dependency graph of the dense network.
    """
    inside = graph.inside(plan.blocks_removed)
    shown = [cost for cost in COSTS.values() if cost.figure and cost.summary]
    sizes = {cost.name: (cost.of(graph), cost.of(graph, plan.counts)) for cost in shown}
    return {
        "fingerprint": plan.fingerprint,
        "groups": {
            g.name: {"width": g.width, "kept": 0 if g.name in inside else plan.counts[g.name]} for g in graph.groups
        },
        **({"blocks_removed": list(plan.blocks_removed)} if plan.blocks_removed else {}),
        "dense": {name: before for name, (before, _) in sizes.items()},
        "pruned": {name: after for name, (_, after) in sizes.items()},
        "removed": {name: 1 - after / before for name, (before, after) in sizes.items()},
    }


def as_text(body: dict[str, Any]) -> str:
    """Format the result of ``summarize_plan`` for a terminal."""
    cut = {name: group for name, group in body["groups"].items() if group["kept"] < group["width"]}
    lines = [f"{name:40} {group['kept']:5} of {group['width']}" for name, group in cut.items()]
    if body.get("blocks_removed"):
        lines.append(f"{len(body['blocks_removed'])} residual blocks go: {', '.join(body['blocks_removed'])}")
    removed = ", ".join(f"{name} -{100 * share:.2f} %" for name, share in body["removed"].items())
    counts = f"{len(cut)} of {len(body['groups'])} groups are cut: {removed}"
    return "\n".join([*lines, counts, f"plan {body['fingerprint']}"])

"""Stage ``select``, after ``score`` in each round: from scores to a plan; pure, the same on every rank.

    round_N/scores.safetensors, round_{N-1}/plan.json (N > 1) -> round_N/plan.json, round_N/cut.json (N > 1)

``plan.json`` contains all rounds so far in dense coordinates, ``cut.json`` this round alone.
"""

from collections.abc import Mapping
from typing import Any

import torch

from dist_prune.pipeline.context import RunContext, StageOutput
from dist_prune.pipeline.stage_graph import round_path
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.block_masks import weights_left
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.cost import counted_costs
from dist_prune.pruning.selection.ranking import check_target
from dist_prune.stages import latency_target


def run(context: RunContext) -> StageOutput:
    """Select the channels to keep; facts: the achieved shares, the plan's fingerprint, a missed target, the table."""
    recipe, graph = context.recipe, context.networks.graph
    texts: dict[str, str] = {}
    latency, method_table = {}, []
    if recipe.select.plan:
        cut = context.networks.replayed_plan(context.selection, lambda line: context.tracker.info(f"  {line}"))
        context.events.append({"stage": "select", "event": "replayed", "plan": recipe.select.plan})
    else:
        graph = context.selection_graph()
        cut, latency, method_table = _select(context, context.networks.round_graph(graph, context.round))
    plan = cut
    if context.round > 1:
        plan = context.networks.plan(context.round - 1).then(cut)
        texts[round_path(context.round, "cut.json")] = cut.to_json()
    if cut.empty:
        context.tracker.info(
            "  the plan removes nothing: every group keeps all its channels. "
            "Lower select.threshold, select.keep_ratio or the target to cut."
        )
        context.events.append({"stage": "select", "event": "nothing removed"})
    shares = {cost.name: cost.share(graph, plan.counts) for cost in counted_costs()}
    if plan.blocks:
        counts = weights_left(plan, graph).values()
        shares["weights"] = sum(kept for kept, _ in counts) / sum(whole for _, whole in counts)
    context.tracker.info("  kept: " + ", ".join(f"{share:.1%} of the {q}" for q, share in shares.items()))
    facts: dict[str, Any] = {"achieved": shares, "fingerprint": plan.fingerprint}
    if latency:
        shares["latency"] = latency["measured"]
        facts["latency"] = latency
    reason = (
        (latency_target.miss_reason(context, latency) if latency else _miss_reason(context, graph, shares))
        if context.round == recipe.schedule.rounds
        else ""
    )
    if reason:
        context.tracker.info(f"  {reason}")
        context.events.append({"stage": "select", "event": "target missed", "why": reason})
        facts["missed"] = reason
    facts |= {"table": method_table} if method_table else {}
    for row in method_table:
        context.tracker.info("  " + ", ".join(f"{name} {_shown(value)}" for name, value in row.items()))
    return StageOutput(facts, texts={round_path(context.round, "plan.json"): plan.to_json(), **texts})


def _select(context: RunContext, graph: DependencyGraph) -> tuple[Plan, dict[str, Any], list[dict[str, Any]]]:
    """The round's plan for the network of ``graph``; a latency target's times; the method's table."""
    scores = context.read_tensors(round_path(context.round, "scores.safetensors"))
    request = context.round_selection(graph)

    def choose(graph_with_costs: DependencyGraph) -> Plan:
        check_target(graph_with_costs, request)
        with torch.no_grad():
            return context.method.select(scores, graph_with_costs, request)

    latency: dict[str, Any] = {}
    if request.cost is None or not request.cost.measured:
        plan = choose(graph)
    else:
        plan, latency = latency_target.search_latency(context, graph, choose)
        graph = latency_target.with_times(graph, latency)
    for text in context.method.warnings(scores, graph):
        context.tracker.info(f"  warning: {text}")
        context.events.append({"stage": "select", "event": f"warning: {text}"})
    return plan, latency, context.method.table(scores, graph, request)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else "-" if value is None else f"{value:.6g}"


def _miss_reason(context: RunContext, graph: DependencyGraph, shares: Mapping[str, float]) -> str:
    """Why the network is further from its target than the recipe tolerates; empty if it is not."""
    cost, target_pair = context.selection.cost, context.selection.target
    if cost is None or target_pair is None or cost.measured:
        return ""
    (quantity, share), tolerance = target_pair, getattr(context.recipe.target, cost.tolerance)
    if tolerance is None:
        return ""
    deviation = shares[quantity] / share - 1
    if abs(deviation) <= tolerance:
        return ""
    steps_of_groups = {group.name: context.selection.multiple(group) for group in graph.free}
    step_sizes = sorted({step for step in steps_of_groups.values() if step > 1})
    reason = (
        f"channels go in steps of {step_sizes[-1]} (select.round_to)" if step_sizes else "its steps are that coarse"
    )
    return (
        f"target.{quantity}: {share:.4g} was asked for, {shares[quantity]:.4g} is left, {deviation:+.1%}, more than "
        f"target.{cost.tolerance} {tolerance:.1%}: {reason}, and no network in between respects it, "
        "select.min_channels, select.max_ratio and what the method does with them. Lower select.round_to, move the "
        "target, or raise the tolerance."
    )

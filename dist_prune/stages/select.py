"""From scores to a plan: pure, the same on every rank."""

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
    """round_N/scores.safetensors -> round_N/plan.json, in dense coordinates; from the second round on, cut.json"""
    recipe, graph, texts = context.recipe, context.networks.graph, {}
    timed, table = {}, []
    if recipe.select.plan:
        cut = context.networks.replayed_plan(context.selection)
        context.events.append({"stage": "select", "event": "replayed", "plan": recipe.select.plan})
    else:
        graph = context.selection_graph()
        cut, timed, table = _chosen(context, context.networks.round_graph(graph, context.round))
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
    if timed:
        shares["latency"] = timed["measured"]
        facts["latency"] = timed
    missed = (
        (latency_target.miss_reason(context, timed) if timed else _missed(context, graph, shares))
        if context.round == recipe.schedule.rounds
        else ""
    )
    if missed:
        context.tracker.info(f"  {missed}")
        context.events.append({"stage": "select", "event": "target missed", "why": missed})
        facts["missed"] = missed
    facts |= {"table": table} if table else {}
    for row in table:
        context.tracker.info("  " + ", ".join(f"{name} {_shown(value)}" for name, value in row.items()))
    return StageOutput(facts, texts={round_path(context.round, "plan.json"): plan.to_json(), **texts})


def _chosen(context: RunContext, graph: DependencyGraph) -> tuple[Plan, dict[str, Any], list[dict[str, Any]]]:
    """What this round cuts of the network with these ``graph``; a latency target's times; the method's table."""
    scores = context.read_tensors(round_path(context.round, "scores.safetensors"))
    asked = context.round_selection(graph)

    def choose(known: DependencyGraph) -> Plan:
        check_target(known, asked)
        with torch.no_grad():
            return context.method.select(scores, known, asked)

    timed: dict[str, Any] = {}
    if asked.cost is None or not asked.cost.measured:
        plan = choose(graph)
    else:
        plan, timed = latency_target.search_latency(context, graph, choose)
        graph = latency_target.with_times(graph, timed)
    for text in context.method.warnings(scores, graph):
        context.tracker.info(f"  warning: {text}")
        context.events.append({"stage": "select", "event": f"warning: {text}"})
    return plan, timed, context.method.table(scores, graph, asked)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else "-" if value is None else f"{value:.6g}"


def _missed(context: RunContext, graph: DependencyGraph, shares: Mapping[str, float]) -> str:
    """Why the network is further from its target than the recipe tolerates; empty where it is not."""
    cost, asked = context.selection.cost, context.selection.target
    if cost is None or asked is None or cost.measured:
        return ""
    (quantity, share), tolerance = asked, getattr(context.recipe.target, cost.tolerance)
    if tolerance is None:
        return ""
    off = shares[quantity] / share - 1
    if abs(off) <= tolerance:
        return ""
    steps = {group.name: context.selection.multiple(group) for group in graph.free}
    coarse = sorted({step for step in steps.values() if step > 1})
    why = f"channels go in steps of {coarse[-1]} (select.round_to)" if coarse else "its steps are that coarse"
    return (
        f"target.{quantity}: {share:.4g} was asked for, {shares[quantity]:.4g} is left, {off:+.1%}, more than "
        f"target.{cost.tolerance} {tolerance:.1%}: {why}, and no network in between respects it, select.min_channels, "
        "select.max_ratio and what the method does with them. Lower select.round_to, move the target, or raise the "
        "tolerance."
    )

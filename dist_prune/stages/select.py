"""Stage ``select``, after ``score`` in each round: from scores to a plan; pure, the same on every rank.

    round_N/scores.safetensors, round_{N-1}/plan.json (N > 1) -> round_N/plan.json, round_N/cut.json (N > 1)

``plan.json`` contains all rounds so far in dense coordinates, ``cut.json`` this round alone. With ``select.search``
it is not pure: it judges networks on images (``stages/ratio_search.py``).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dist_prune.pipeline.context import RunContext, StageOutput
from dist_prune.pipeline.search_checks import read_front
from dist_prune.pipeline.stage_graph import judges, round_path
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.block_masks import weights_left
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.cost import COSTS, counted_costs
from dist_prune.pruning.selection.ranking import check_target
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.activation_memory import measure_peak
from dist_prune.stages import latency_target, ratio_search


def run(context: RunContext) -> StageOutput:
    """Select the channels to keep; facts: the achieved shares, the plan's fingerprint, a missed target, the table."""
    recipe, graph = context.recipe, context.networks.graph
    texts: dict[str, str] = {}
    latency, method_table, search = {}, [], {}
    if recipe.select.plan:
        cut = context.networks.replayed_plan(context.selection, lambda line: context.tracker.info(f"  {line}"))
        context.events.append({"stage": "select", "event": "replayed", "plan": recipe.select.plan})
    else:
        graph = context.selection_graph()
        selected = _select(context, context.networks.round_graph(graph, context.round))
        cut, latency, method_table, search = selected.plan, selected.latency, selected.table, selected.search
        if selected.text:
            texts[round_path(context.round, "search.json")] = selected.text
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
    shares = {cost.name: cost.share(graph, plan.counts) for cost in counted_costs(context.selection.cost)}
    if plan.blocks:
        counts = weights_left(plan, graph).values()
        shares["weights"] = sum(kept for kept, _ in counts) / sum(whole for _, whole in counts)
    if cut.blocks_removed:
        context.tracker.info(f"  {len(cut.blocks_removed)} residual blocks go: {', '.join(cut.blocks_removed)}")
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
    facts |= {"search": search} if search else {}
    if context.recipe.target.memory is not None:
        facts["memory"] = _measured_memory(context, graph, plan)
    for row in method_table:
        context.tracker.info("  " + ", ".join(f"{name} {_shown(value)}" for name, value in row.items()))
    texts = {round_path(context.round, "plan.json"): plan.to_json(), **texts}
    return StageOutput(facts, texts=texts, drop=(round_path(context.round, ratio_search.PARTIAL),))


@dataclass(frozen=True)
class _Selected:
    """A round's plan, a latency target's times, the method's table, facts of a search, and its search.json."""

    plan: Plan
    latency: dict[str, Any]
    table: list[dict[str, Any]]
    search: dict[str, Any]
    text: str = ""


def _select(context: RunContext, graph: DependencyGraph) -> _Selected:
    """The round's plan for the network of ``graph``."""
    scores = context.read_tensors(round_path(context.round, "scores.safetensors"))
    request, search, text = context.round_selection(graph), {}, ""

    def choose(graph_with_costs: DependencyGraph) -> Plan:
        check_target(graph_with_costs, request)
        with torch.no_grad():
            if context.recipe.select.search:
                return ratio_search.knapsack_plan(context, graph_with_costs, scores)
            return context.method.select(scores, graph_with_costs, request)

    latency: dict[str, Any] = {}
    if judges(context.recipe):
        check_target(graph, request)
        found = ratio_search.evolve(context, graph, scores)
        plan, latency, search, text = found.plan, found.latency, found.facts, found.text
    elif context.recipe.select.from_:
        plan, search = ratio_search.take_from(context, graph, scores, read_front(context.recipe))
    elif request.cost is None or not request.cost.measured:
        plan = choose(graph)
    else:
        plan, latency = latency_target.search_latency(context, graph, choose)
    graph = latency_target.with_times(graph, latency) if latency else graph
    if context.recipe.select.search and not search:
        uniform = ratio_search.uniform_plan(context, graph, scores)
        search = {"solver": "knapsack", "groups": ratio_search.ratios(graph, uniform, plan)}
    for warning in context.method.warnings(scores, graph):
        context.tracker.info(f"  warning: {warning}")
        context.events.append({"stage": "select", "event": f"warning: {warning}"})
    return _Selected(plan, latency, context.method.table(scores, graph, request), search, text)


def _measured_memory(context: RunContext, graph: DependencyGraph, plan: Plan) -> dict[str, Any]:
    """The peak of activations of the dense and of the pruned network, counted and measured on one image."""

    def measure() -> dict[str, Any]:
        dense = context.networks.load_dense()
        small = copy.deepcopy(dense)
        surgeon.apply_plan(small, graph, plan)
        image = context.images.example_input
        return {
            name: {"counted": int(COSTS["memory"].of(graph, counts)), "measured": measure_peak(model, image)}
            for name, model, counts in (("dense", dense, {}), ("pruned", small, plan.counts))
        }

    found = context.environment.comm.broadcast_object(context.environment.comm.run_on_main(measure)) or {}
    context.tracker.info(
        "  memory: " + ", ".join(f"{name} {one['measured'] / 1e3:,.0f} kB for an image" for name, one in found.items())
    )
    for name, one in found.items():
        if one["counted"] != one["measured"]:
            text = (
                f"warning: {name}: {one['counted']:,} bytes of activations were counted, {one['measured']:,} measured"
            )
            context.events.append({"stage": "select", "event": text})
    return found


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
    if context.selection.depth == "only":
        return (
            f"target.{quantity}: {share:.4g} was asked for, {shares[quantity]:.4g} is left, {deviation:+.1%}, more "
            f"than target.{cost.tolerance} {tolerance:.1%}: blocks go as a whole (select.depth=only). Write "
            "select.depth=true so that channels fill the gap, move the target, or raise the tolerance."
        )
    reason = (
        f"channels go in steps of {step_sizes[-1]} (select.round_to)" if step_sizes else "its steps are that coarse"
    )
    return (
        f"target.{quantity}: {share:.4g} was asked for, {shares[quantity]:.4g} is left, {deviation:+.1%}, more than "
        f"target.{cost.tolerance} {tolerance:.1%}: {reason}, and no network in between respects it, "
        "select.min_channels, select.max_ratio and what the method does with them. Lower select.round_to, move the "
        "target, or raise the tolerance."
    )

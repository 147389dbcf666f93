"""From scores to a plan: pure, the same on every rank."""

from collections.abc import Mapping
from typing import Any

import torch

from dist_prune.pruning.channels import Channels
from dist_prune.pruning.choose import check_target
from dist_prune.pruning.cost import countable
from dist_prune.pruning.masks import weights_left
from dist_prune.pruning.plan import Plan
from dist_prune.stages import timing
from dist_prune.stages.work import Made, Work


def act(work: Work) -> Made:
    """round_N/scores.safetensors -> round_N/plan.json, in dense coordinates; from the second round on, cut.json"""
    recipe, channels, texts = work.recipe, work.channels, {}
    timed, table = {}, []
    if recipe.select.plan:
        cut = work.replayed()
        work.events.append({"stage": "select", "event": "replayed", "plan": recipe.select.plan})
    else:
        channels = work.method.ready(channels, recipe.select.exclude, work.request)
        cut, timed, table = _chosen(work, work.left(channels))
    plan = cut
    if work.round > 1:
        plan = work.plan_of(work.round - 1).then(cut)
        texts[work.here("cut.json")] = cut.to_json()
    if cut.empty:
        work.tracker.say(
            "  the plan removes nothing: every group keeps all its channels. "
            "Lower select.threshold, select.keep_ratio or the target to cut."
        )
        work.events.append({"stage": "select", "event": "nothing removed"})
    shares = {cost.name: cost.share(channels, plan.counts) for cost in countable()}
    if plan.blocks:
        counts = weights_left(plan, channels).values()
        shares["weights"] = sum(kept for kept, _ in counts) / sum(whole for _, whole in counts)
    work.tracker.say("  kept: " + ", ".join(f"{share:.1%} of the {q}" for q, share in shares.items()))
    facts: dict[str, Any] = {"achieved": shares, "fingerprint": plan.fingerprint}
    if timed:
        shares["latency"] = timed["measured"]
        facts["latency"] = timed
    missed = (
        (timing.missed(work, timed) if timed else _missed(work, channels, shares))
        if work.round == recipe.schedule.rounds
        else ""
    )
    if missed:
        work.tracker.say(f"  {missed}")
        work.events.append({"stage": "select", "event": "target missed", "why": missed})
        facts["missed"] = missed
    facts |= {"table": table} if table else {}
    for row in table:
        work.tracker.say("  " + ", ".join(f"{name} {_shown(value)}" for name, value in row.items()))
    return Made(facts, texts={work.here("plan.json"): plan.to_json(), **texts})


def _chosen(work: Work, channels: Channels) -> tuple[Plan, dict[str, Any], list[dict[str, Any]]]:
    """What this round cuts of the network with these ``channels``; a latency target's times; the method's table."""
    scores, asked = work.tensors(work.here("scores.safetensors")), work.asked(channels)

    def choose(known: Channels) -> Plan:
        check_target(known, asked)
        with torch.no_grad():
            return work.method.select(scores, known, asked)

    timed: dict[str, Any] = {}
    if asked.cost is None or not asked.cost.measured:
        plan = choose(channels)
    else:
        plan, timed = timing.fitted(work, channels, choose)
        channels = timing.known(channels, timed)
    for text in work.method.warnings(scores, channels):
        work.tracker.say(f"  warning: {text}")
        work.events.append({"stage": "select", "event": f"warning: {text}"})
    return plan, timed, work.method.table(scores, channels, asked)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else "-" if value is None else f"{value:.6g}"


def _missed(work: Work, channels: Channels, shares: Mapping[str, float]) -> str:
    """Why the network is further from its target than the recipe tolerates; empty where it is not."""
    cost, asked = work.request.cost, work.request.target
    if cost is None or asked is None or cost.measured:
        return ""
    (quantity, share), tolerance = asked, getattr(work.recipe.target, cost.tolerance)
    if tolerance is None:
        return ""
    off = shares[quantity] / share - 1
    if abs(off) <= tolerance:
        return ""
    steps = {group.name: work.request.step(group) for group in channels.free}
    coarse = sorted({step for step in steps.values() if step > 1})
    why = f"channels go in steps of {coarse[-1]} (select.round_to)" if coarse else "its steps are that coarse"
    return (
        f"target.{quantity}: {share:.4g} was asked for, {shares[quantity]:.4g} is left, {off:+.1%}, more than "
        f"target.{cost.tolerance} {tolerance:.1%}: {why}, and no network in between respects it, select.min_channels, "
        "select.max_ratio and what the method does with them. Lower select.round_to, move the target, or raise the "
        "tolerance."
    )

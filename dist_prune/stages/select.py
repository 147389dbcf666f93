"""From scores to a plan: pure, the same on every rank."""

from typing import Any

import torch

from dist_prune.pruning.cost import amount
from dist_prune.pruning.masks import weights_left
from dist_prune.stages.work import Made, Work

SCORES = "round_1/scores.safetensors"


def act(work: Work) -> Made:
    """round_1/scores.safetensors -> round_1/plan.json"""
    recipe, channels = work.recipe, work.channels
    if recipe.select.plan:
        plan = work.replayed()
        work.events.append({"stage": "select", "event": "replayed", "plan": recipe.select.plan})
    else:
        channels = work.method.ready(channels, recipe.select.exclude, work.request)
        with torch.no_grad():
            plan = work.method.select(work.tensors(SCORES), channels, work.request)
        for text in work.method.warnings(work.tensors(SCORES), channels):
            work.tracker.say(f"  warning: {text}")
            work.events.append({"stage": "select", "event": f"warning: {text}"})
    if plan.empty:
        work.tracker.say(
            "  the plan removes nothing: every group keeps all its channels. "
            "Lower select.threshold, select.keep_ratio or the target to cut."
        )
        work.events.append({"stage": "select", "event": "nothing removed"})
    shares = {q: amount(channels, q, plan.counts) / amount(channels, q) for q in ("macs", "params", "channels")}
    if plan.blocks:
        counts = weights_left(plan, channels).values()
        shares["weights"] = sum(kept for kept, _ in counts) / sum(whole for _, whole in counts)
    work.tracker.say("  kept: " + ", ".join(f"{share:.1%} of the {q}" for q, share in shares.items()))
    for quantity, asked in filter(None, [work.recipe.target.asked()]):
        short = asked - shares[quantity]
        if short > 0.01:
            work.tracker.say(
                f"  {short:.1%} less than asked of the {quantity}: thresholds and select.round_to are coarse"
            )
            work.events.append({"stage": "select", "event": "smaller than asked", "by": round(short, 4)})
    facts: dict[str, Any] = {"achieved": shares, "fingerprint": plan.fingerprint}
    if not recipe.select.plan:
        table = work.method.table(work.tensors(SCORES), channels, work.request)
        facts |= {"table": table} if table else {}
        for row in table:
            work.tracker.say("  " + ", ".join(f"{name} {_shown(value)}" for name, value in row.items()))
    return Made(facts, texts={"round_1/plan.json": plan.to_json()})


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else "-" if value is None else f"{value:.6g}"

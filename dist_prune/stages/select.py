"""From scores to a plan: pure, the same on every rank."""

import torch

from dist_prune.pruning.cost import amount
from dist_prune.stages.work import Made, Work


def act(work: Work) -> Made:
    """round_1/scores.safetensors -> round_1/plan.json"""
    recipe, channels = work.recipe, work.channels
    if recipe.select.plan:
        plan = work.replayed()
        work.events.append({"stage": "select", "event": "replayed", "plan": recipe.select.plan})
    else:
        channels = work.method.ready(channels, recipe.select.exclude, work.request)
        with torch.no_grad():
            plan = work.method.select(work.tensors("round_1/scores.safetensors"), channels, work.request)
    if plan.empty:
        work.tracker.say(
            "  the plan removes nothing: every group keeps all its channels. "
            "Lower select.threshold, select.keep_ratio or the target to cut."
        )
        work.events.append({"stage": "select", "event": "nothing removed"})
    shares = {q: amount(channels, q, plan.counts) / amount(channels, q) for q in ("macs", "params", "channels")}
    work.tracker.say("  kept: " + ", ".join(f"{share:.1%} of the {q}" for q, share in shares.items()))
    for quantity, asked in filter(None, [work.recipe.target.asked()]):
        short = asked - shares[quantity]
        if short > 0.01:
            work.tracker.say(
                f"  {short:.1%} less than asked of the {quantity}: thresholds and select.round_to are coarse"
            )
            work.events.append({"stage": "select", "event": "smaller than asked", "by": round(short, 4)})
    return Made({"achieved": shares, "fingerprint": plan.fingerprint}, texts={"round_1/plan.json": plan.to_json()})

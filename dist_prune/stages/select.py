"""From scores to a plan: pure, the same on every rank."""

import torch

from dist_prune.errors import PruneError
from dist_prune.pruning.choose import Request, check_target
from dist_prune.pruning.cost import amount
from dist_prune.stages.work import Made, Work


def act(work: Work) -> Made:
    """round_1/scores.safetensors -> round_1/plan.json"""
    recipe = work.recipe
    scores = work.tensors("round_1/scores.safetensors")
    channels = work.channels.without(recipe.select.exclude)
    if not channels.free:
        raise PruneError(
            "no channel group is free to be cut: "
            + "; ".join(f"{group.name}: {group.protected}" for group in channels.groups[:5])
        )
    keys = recipe.select.model_dump(exclude={"exclude"})
    request = Request(**keys, target=recipe.target.asked())  # type: ignore[arg-type]
    check_target(channels, request)
    with torch.no_grad():
        plan = work.method.select(scores, channels, request)
    if plan.empty:
        work.tracker.say(
            "  the plan removes nothing: every group keeps all its channels. "
            "Lower select.threshold, select.keep_ratio or the target to cut."
        )
        work.events.append({"stage": "select", "event": "nothing removed"})
    shares = {q: amount(channels, q, plan.counts) / amount(channels, q) for q in ("macs", "params", "channels")}
    work.tracker.say("  kept: " + ", ".join(f"{share:.1%} of the {q}" for q, share in shares.items()))
    return Made({"achieved": shares, "fingerprint": plan.fingerprint}, texts={"round_1/plan.json": plan.to_json()})

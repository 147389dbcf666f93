"""Cut the plan's channels out of the dense network, for real."""

from pathlib import Path

import torch

from dist_prune import bundle
from dist_prune.pruning import surgeon
from dist_prune.pruning.renew import renew
from dist_prune.stages.calibrating import starting
from dist_prune.stages.work import Made, Work


def act(work: Work) -> Made:
    """dense, scores, plan -> round_1/small.safetensors; of a bundle that is replayed, its own weights"""
    plan, place = work.plan, Path(work.recipe.select.plan or "").expanduser()
    if work.recipe.select.plan and place.is_dir():
        weights = bundle.load(place).state_dict()
        work.tracker.say(f"  {place} is a bundle: its weights are taken, nothing is cut here")
        return Made({}, {"round_1/small.safetensors": (weights, {"plan": plan.fingerprint})})
    model = starting(work).eval()
    surgeon.operate(model, work.channels, plan)
    fresh = work.method.fresh(work.channels)
    if fresh:
        renew(model, fresh, work.recipe.seed)
        work.tracker.say(f"  new weights, as the released code does: {', '.join(fresh)}")
        work.events.append({"stage": "prune", "event": "new weights", "layers": list(fresh)})
    with torch.no_grad():
        model(work.example)
    return Made({}, {"round_1/small.safetensors": (model.state_dict(), {"plan": plan.fingerprint})})

"""Cut a round's channels out of the network that it starts from, for real; the optimizer's state along with it."""

from functools import partial
from pathlib import Path

import torch

from dist_prune import bundle
from dist_prune.pruning import surgeon
from dist_prune.pruning.plan import Plan
from dist_prune.pruning.renew import renew
from dist_prune.runtime.training.carrying import Carried
from dist_prune.stages.calibrating import starting
from dist_prune.stages.order import at
from dist_prune.stages.work import Made, Tensors, Work


def act(work: Work) -> Made:
    """dense (or what the round before left), scores, plan -> round_N/small.safetensors, and carried.safetensors where
    a state goes on; of a bundle that is replayed, its own weights"""
    small = work.here("small.safetensors")
    plan, place = work.plan, Path(work.recipe.select.plan or "").expanduser()
    if work.recipe.select.plan and place.is_dir():
        weights = bundle.load(place).state_dict()
        work.tracker.say(f"  {place} is a bundle: its weights are taken, nothing is cut here")
        return Made({}, {small: (weights, {"plan": plan.fingerprint})})
    model, channels, cut = starting(work).eval(), work.left(work.channels), plan
    if work.round > 1:
        cut = Plan.from_json((work.folder / work.here("cut.json")).read_text())
    tensors: Tensors = {}
    if work.round > 1 and work.recipe.schedule.carry_optimizer:
        carried = Carried.read(work.folder / at(work.round - 1, "state.safetensors"))
        tensors[work.here("carried.safetensors")] = carried.cut(partial(surgeon.cut_along, model, channels, cut)).file()
    surgeon.operate(model, channels, cut)
    fresh = work.method.fresh(work.channels)
    if fresh:
        renew(model, fresh, work.recipe.seed)
        work.tracker.say(f"  new weights, as the released code does: {', '.join(fresh)}")
        work.events.append({"stage": "prune", "event": "new weights", "layers": list(fresh)})
    with torch.no_grad():
        model(work.example)
    return Made({}, {small: (model.state_dict(), {"plan": plan.fingerprint}), **tensors})

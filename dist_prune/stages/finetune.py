"""Train the small network again, between two rounds or after the last one; where the recipe asks for reruns, several
times by other seeds."""

import statistics
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dist_prune.pruning.masks import masks_of
from dist_prune.recipe import Training
from dist_prune.runtime.data.dealing import calibration
from dist_prune.runtime.evaluation import evaluate
from dist_prune.runtime.training.carrying import Carried
from dist_prune.runtime.training.recalibrate import recalibrate
from dist_prune.runtime.training.train import Trainer
from dist_prune.stages.fitting import judge_of, trained
from dist_prune.stages.work import Made, Tensors, Work

SMALL = "small.safetensors"


def act(work: Work) -> Made:
    """round_N/small.safetensors -> tuned.safetensors; before the last round round_N/tuned.safetensors, and
    state.safetensors where the optimizer's state goes on"""
    if work.round < work.recipe.schedule.rounds:
        return _between(work)
    settings, reruns = work.recipe.finetune, work.recipe.reruns
    if settings.only_if_drop is not None and settings.epochs:
        drop = _drop(work)
        if drop <= settings.only_if_drop:
            work.tracker.say(
                f"  cutting cost {drop:.2f} points of top-1, at most {settings.only_if_drop:g}: left as it is"
            )
            work.events.append({"stage": "finetune", "event": "not needed", "drop": drop})
            facts = {"history": [], "selection": settings.selection}
            return Made(facts, {"tuned.safetensors": (work.tensors(work.here(SMALL)), {"plan": work.plan.fingerprint})})
    tops, kept, first = [], {}, []
    for rerun in range(reruns):
        model, trainer = _tuned(work, settings, "finetune", rerun)
        if rerun == 0:
            kept, first = {n: tensor.cpu().clone() for n, tensor in model.state_dict().items()}, trainer.history
        if reruns > 1:
            tops.append(_top1(work, model))
            work.tracker.say(f"  rerun {rerun + 1} of {reruns}: {tops[-1]:.2f} % on the test images")
    facts: dict[str, Any] = {"history": first, "selection": settings.selection}
    if tops:
        spread = statistics.stdev(tops)
        facts["reruns"] = {"top1": tops, "mean": statistics.mean(tops), "std": spread}
    meta = {"plan": work.plan.fingerprint}
    return Made(facts, {"tuned.safetensors": (kept, meta)}, drop=("finetune_checkpoints",))


def _drop(work: Work) -> float:
    """Points of top-1 that cutting cost, on the images by which epochs are chosen (held out, or the test images)."""
    judge = judge_of(work, work.recipe.finetune)
    tops = [judge(model.to(work.machine.device))["top1"] for model in (work.dense(), work.small(work.here(SMALL)))]
    return tops[0] - tops[1]


def _between(work: Work) -> Made:
    """One finetuning by the recipe's finetune section, for as many epochs as lie between two rounds."""
    settings, carry, name = work.recipe.between, work.recipe.schedule.carry_optimizer, work.here("finetune")
    model, trainer = _tuned(work, settings, name, leaves=carry)
    tensors: Tensors = {work.here("tuned.safetensors"): (model.state_dict(), {"plan": work.plan.fingerprint})}
    if trainer.left is not None:
        tensors[work.here("state.safetensors")] = trainer.left.file()
    facts = {"history": trainer.history, "selection": settings.selection}
    return Made(facts, tensors, drop=(f"{name}_checkpoints",))


def _tuned(
    work: Work, settings: Training, name: str, rerun: int = 0, leaves: bool = False
) -> tuple[nn.Module, Trainer]:
    """The small network, finetuned by the recipe's seed + ``rerun``, its masked weights at exact zeros."""
    model = work.small(work.here(SMALL))
    carried = None
    if work.recipe.schedule.carry_optimizer and work.round > 1 and settings.epochs:
        carried = Carried.read(work.folder / work.here("carried.safetensors"))
        model.load_state_dict(carried.tables.get("model", model.state_dict()))
    model.to(work.machine.device)
    if settings.recalibrate_bn:
        recipe, (trained_on, _) = work.recipe, work.dealt(settings)
        labels = work.feed(True).source.labels[trained_on]
        chosen = calibration(labels, settings.recalibrate_bn, recipe.seed, recipe.score.balance)
        feed, ids = work.scoring(trained_on[chosen], work.method)
        recalibrate(model, feed, ids, work.recipe.score.micro_batch, work.machine.ranks)
        if carried is not None and "ema" in carried.tables:  # averages go on from the new statistics, not the old ones
            new = model.state_dict()
            ema = carried.tables["ema"]
            ema = {key: new[key].detach().cpu().clone() if "running_" in key else old for key, old in ema.items()}
            carried = replace(carried, tables={**carried.tables, "ema": ema})
    teacher = work.dense() if settings.distill else None
    masks: dict[str, Tensor] = masks_of(work.plan, work.channels, model.state_dict())
    return model, trained(work, model, settings, name, teacher, masks, rerun, carried, leaves)


def _top1(work: Work, model: nn.Module) -> float:
    batch, ranks = work.recipe.evaluate.batch, work.machine.ranks
    return evaluate(model, work.feed(False), batch, ranks, work.tracker, "test images")["top1"]

"""Train the small network again; where the recipe asks for reruns, several times by other seeds."""

import statistics
from typing import Any

from torch import Tensor, nn

from dist_prune.pruning.masks import masks_of
from dist_prune.runtime.data.dealing import calibration
from dist_prune.runtime.evaluation import evaluate
from dist_prune.runtime.training.recalibrate import recalibrate
from dist_prune.stages.fitting import judge_of, trained
from dist_prune.stages.work import Made, Work

SMALL = "round_1/small.safetensors"


def act(work: Work) -> Made:
    """round_1/small.safetensors -> tuned.safetensors"""
    settings, reruns = work.recipe.finetune, work.recipe.reruns
    if settings.only_if_drop is not None and settings.epochs:
        drop = _drop(work)
        if drop <= settings.only_if_drop:
            work.tracker.say(
                f"  cutting cost {drop:.2f} points of top-1, at most {settings.only_if_drop:g}: left as it is"
            )
            work.events.append({"stage": "finetune", "event": "not needed", "drop": drop})
            facts = {"history": [], "selection": settings.selection}
            return Made(facts, {"tuned.safetensors": (work.tensors(SMALL), {"plan": work.plan.fingerprint})})
    tops, kept, first = [], {}, []
    for rerun in range(reruns):
        model, history = _tuned(work, rerun)
        if rerun == 0:
            kept, first = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}, history
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
    tops = [judge(model.to(work.machine.device))["top1"] for model in (work.dense(), work.small(SMALL))]
    return tops[0] - tops[1]


def _tuned(work: Work, rerun: int) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The small network, finetuned by the recipe's seed + ``rerun``, its masked weights at exact zeros."""
    settings = work.recipe.finetune
    model = work.small(SMALL).to(work.machine.device)
    if settings.recalibrate_bn:
        recipe, (trained_on, _) = work.recipe, work.dealt(settings)
        labels = work.feed(True).source.labels[trained_on]
        chosen = calibration(labels, settings.recalibrate_bn, recipe.seed, recipe.score.balance)
        feed, ids = work.scoring(trained_on[chosen])
        recalibrate(model, feed, ids, work.recipe.score.micro_batch, work.machine.ranks)
    teacher = work.dense() if settings.distill else None
    masks: dict[str, Tensor] = masks_of(work.plan, work.channels, model.state_dict())
    return model, trained(work, model, settings, "finetune", teacher, masks, rerun)


def _top1(work: Work, model: nn.Module) -> float:
    batch, ranks = work.recipe.evaluate.batch, work.machine.ranks
    return evaluate(model, work.feed(False), batch, ranks, work.tracker, "test images")["top1"]

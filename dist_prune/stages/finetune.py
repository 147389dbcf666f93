"""Train the small network again; where the recipe asks for reruns, several times by other seeds."""

import statistics
from typing import Any

from torch import Tensor, nn

from dist_prune.pruning.masks import masks_of
from dist_prune.runtime.data.dealing import calibration
from dist_prune.runtime.evaluation import evaluate
from dist_prune.runtime.training.recalibrate import recalibrate
from dist_prune.stages.fitting import trained
from dist_prune.stages.work import Made, Work


def act(work: Work) -> Made:
    """round_1/small.safetensors -> tuned.safetensors"""
    settings, reruns = work.recipe.finetune, work.recipe.reruns
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


def _tuned(work: Work, rerun: int) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The small network, finetuned by the recipe's seed + ``rerun``, its masked weights at exact zeros."""
    settings = work.recipe.finetune
    model = work.small("round_1/small.safetensors").to(work.machine.device)
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

"""Train the small network again."""

import numpy as np

from dist_prune.runtime.training.recalibrate import recalibrate
from dist_prune.stages.fitting import trained
from dist_prune.stages.work import Made, Work


def act(work: Work) -> Made:
    """round_1/small.safetensors -> tuned.safetensors"""
    settings = work.recipe.finetune
    model = work.small("round_1/small.safetensors").to(work.machine.device)
    if settings.recalibrate_bn:
        feed, ids = work.scoring(np.arange(min(settings.recalibrate_bn, len(work.feed(True)))))
        recalibrate(model, feed, ids, work.recipe.score.micro_batch, work.machine.ranks)
    teacher = work.dense() if settings.distill else None
    history = trained(work, model, settings, "finetune", teacher)
    meta = {"plan": work.plan.fingerprint}
    facts = {"history": history, "selection": settings.selection}
    return Made(facts, {"tuned.safetensors": (model.state_dict(), meta)}, drop=("finetune_checkpoints",))

"""The result as a folder that loads anywhere: see dist_prune.load."""

import json
from dataclasses import asdict

from dist_prune.bundle import manifest
from dist_prune.report.tables import KINDS
from dist_prune.stages.work import Made, Work


def act(work: Work) -> Made:
    """tuned.safetensors, plan.json, metrics.json -> export/"""
    spec = work.recipe.backbone
    weights, plan = work.tensors("tuned.safetensors"), work.plan
    metrics = json.loads((work.folder / "metrics.json").read_text())
    figures = {name: {k: v for k, v in metrics[name].items() if k != "latency"} for name in KINDS}
    image = {k: v for k, v in asdict(work.look).items() if k != "augment"}
    backbone = {
        "name": spec.name, "kwargs": spec.kwargs, "num_classes": len(work.classes), "in_chans": work.in_chans,
    }  # fmt: skip
    recipe = work.recipe
    origin = {
        "recipe": recipe.name, "method": recipe.method["name"], "paper": work.method.paper, "seed": recipe.seed,
        "data": recipe.data.source, "finetune_epochs": recipe.finetune.epochs,
    }  # fmt: skip
    text = manifest(backbone, plan, image, work.classes, weights, figures, origin, work.shell())
    return Made({}, {"export/model.safetensors": (weights, {"plan": plan.fingerprint})}, {"export/bundle.json": text})

"""Stage ``export``, after ``evaluate``: the bundle, a folder that ``dist_prune.load`` loads anywhere.

finetuned.safetensors, plan.json, metrics.json -> export/bundle.json, export/model.safetensors
"""

import json
from dataclasses import asdict
from typing import Any

from dist_prune.export.bundle import manifest_json, output_shapes
from dist_prune.pipeline.context import RunContext, StageOutput
from dist_prune.pipeline.stage_graph import BUNDLE, FINETUNED, METRICS
from dist_prune.report.tables import KINDS


def run(context: RunContext) -> StageOutput:
    """Make the bundle of the finetuned network."""
    recipe, images = context.recipe, context.images
    spec = recipe.backbone
    weights, plan = context.read_tensors(FINETUNED), context.networks.plan(context.round)
    metrics = json.loads(context.path(METRICS).read_text())
    figures = {name: {k: v for k, v in metrics[name].items() if k != "latency"} for name in KINDS}
    image = {k: v for k, v in asdict(images.transform).items() if k != "augment"}
    backbone = {
        "name": spec.name,
        "kwargs": spec.kwargs,
        "num_classes": len(images.classes),
        "in_chans": images.in_channels,
    }
    origin = {
        "recipe": recipe.name,
        "method": recipe.method["name"],
        "paper": context.method.paper,
        "seed": recipe.seed,
        "data": recipe.data.source,
        "finetune_epochs": recipe.finetune.epochs,
    }
    described: dict[str, Any] = {}
    if not context.task.is_classification:
        small = context.networks.load_pruned(FINETUNED, context.round).eval()
        shapes = output_shapes(small, tuple(images.example_input.shape[1:]))
        described = {"task": context.task.description(), "outputs": shapes}
    dense = context.networks.create()
    text = manifest_json(backbone, plan, image, images.classes, weights, figures, origin, dense, **described)
    manifest_file, weights_file = BUNDLE
    return StageOutput({}, {weights_file: (weights, {"plan": plan.fingerprint})}, {manifest_file: text})

"""Stage ``export``, after ``evaluate``: the bundle, a folder that ``dist_prune.load`` loads anywhere.

finetuned.safetensors, plan.json, metrics.json -> export/bundle.json, export/model.safetensors
"""

import json
from dataclasses import asdict
from typing import Any

from dist_prune import models
from dist_prune.data.transform_config import TransformConfig
from dist_prune.export.bundle import manifest_json, output_shapes
from dist_prune.pipeline.context import RunContext, StageOutput
from dist_prune.pipeline.stage_graph import BUNDLE, FINETUNED, METRICS
from dist_prune.report.tables import kinds_of


def run(context: RunContext) -> StageOutput:
    """Make the bundle of the finetuned network."""
    recipe, images = context.recipe, context.images
    spec = recipe.backbone
    weights, plan = context.read_tensors(FINETUNED), context.networks.plan(context.round)
    metrics = json.loads(context.path(METRICS).read_text())
    figures = {name: {k: v for k, v in metrics[name].items() if k != "latency"} for name in kinds_of(metrics)}
    image = {k: v for k, v in asdict(images.transform).items() if k != "augment"}
    for key in ("decoder", "dct_scaled", "augment_on", "resizer"):  # versions without these keys read other bundles
        if image[key] == TransformConfig.__dataclass_fields__[key].default:
            del image[key]
    name, kwargs = models.portable(spec.name, spec.kwargs)
    backbone = {
        "name": name,
        "kwargs": kwargs,
        "num_classes": len(images.classes),
        "in_chans": images.in_channels,
    }
    origin: dict[str, Any] = {
        "recipe": recipe.name,
        "method": recipe.method["name"],
        "paper": context.method.paper,
        "seed": recipe.seed,
        "data": recipe.data.source,
        "finetune_epochs": recipe.finetune.epochs,
    }
    start, dense = context.networks.start, None
    if start is None:
        dense = context.networks.create()
    else:
        plan, dense = (
            context.networks.whole_plan(context.round),
            start.create_dense(len(images.classes), images.in_channels),
        )
        origin["started_from"] = start.origin()
        if recipe.select.plan:  # nothing was scored here
            before = start.origin()["origin"]
            origin |= {key: before[key] for key in ("method", "paper") if key in before}
    described: dict[str, Any] = {}
    if not context.task.is_classification:
        small = context.networks.load_pruned(FINETUNED, context.round).eval()
        shapes = output_shapes(small, tuple(images.example_input.shape[1:]))
        described = {"task": context.task.description(), "outputs": shapes}
    text = manifest_json(backbone, plan, image, images.classes, weights, figures, origin, dense, **described)
    manifest_file, weights_file = BUNDLE
    return StageOutput({}, {weights_file: (weights, {"plan": plan.fingerprint})}, {manifest_file: text})

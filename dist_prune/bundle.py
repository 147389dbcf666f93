"""A pruned network as a folder: weights, plan and what its images look like. Loading traces and unpickles nothing.

``bundle.json`` names the backbone and its arguments, the plan, the input, the classes and the figures measured;
``model.safetensors`` holds the small network's weights.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.errors import PruneError
from dist_prune.pruning.plan import Plan
from dist_prune.pruning.rebuild import rebuild
from dist_prune.runtime import backbones, checkpoint

FORMAT = 1
MANIFEST, WEIGHTS = "bundle.json", "model.safetensors"


def manifest(
    backbone: Mapping[str, Any],
    plan: Plan,
    image: Mapping[str, Any],
    classes: tuple[str, ...],
    weights: Mapping[str, Tensor],
    figures: Mapping[str, Any],
) -> str:
    """The text of ``bundle.json``.

    Args:
        backbone: ``name``, ``kwargs``, ``num_classes``, ``in_chans``.
        plan: what was cut, in dense coordinates.
        image: ``size``, ``mean``, ``std``, ``crop``, ``interpolation`` of the evaluation look.
        classes: class names, in the order of the logits.
        weights: the small network's state dict.
        figures: accuracies and costs for a reader.
    """
    body = {
        "format": FORMAT, "backbone": dict(backbone), "plan": json.loads(plan.to_json()), "image": dict(image),
        "classes": list(classes), "figures": dict(figures), "weights_digest": digest_of(weights),
    }  # fmt: skip
    return json.dumps(body, indent=1)


def load(folder: str | Path) -> nn.Module:
    """The pruned network of an export folder, in evaluation mode, with its weights.

    Raises:
        PruneError: no bundle there, a format this version does not read, or files that were altered or cut short.
    """
    place = Path(folder)
    if not (place / MANIFEST).is_file() or not (place / WEIGHTS).is_file():
        raise PruneError(f"{place} is no bundle: it has no {MANIFEST} and {WEIGHTS}. A run writes one to RUN/export.")
    try:
        body = json.loads((place / MANIFEST).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PruneError(f"{place / MANIFEST} is damaged: {error}") from error
    if not isinstance(body, dict):
        raise PruneError(f"{place / MANIFEST} is damaged: it holds no mapping")
    if body.get("format") != FORMAT:
        raise PruneError(f"{place}: bundle format {body.get('format')!r}; this version reads format {FORMAT}")
    weights, _ = checkpoint.read(place / WEIGHTS)
    try:
        spec, wanted, plan = body["backbone"], body["weights_digest"], Plan.from_json(json.dumps(body["plan"]))
        arguments = (spec["name"], spec["num_classes"], spec["in_chans"], False, spec["kwargs"])
    except (KeyError, TypeError) as error:
        raise PruneError(f"{place / MANIFEST} is damaged: {error!r}") from error
    if digest_of(weights) != wanted:
        raise PruneError(f"{place}: {WEIGHTS} is not the file that {MANIFEST} describes: it was altered or replaced")
    return rebuild(backbones.create(*arguments), plan, weights).eval()


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and values, in the order of the names."""
    whole = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()

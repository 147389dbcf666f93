"""The dense network: from the recipe's checkpoint, or trained here."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from dist_prune.errors import PruneError
from dist_prune.runtime import checkpoint
from dist_prune.runtime.backbones.foreign import translated
from dist_prune.stages.fitting import trained
from dist_prune.stages.work import Made, Work


def act(work: Work) -> Made:
    """-> dense.safetensors"""
    recipe = work.recipe
    model = work.fresh()
    history = []
    if recipe.backbone.checkpoint:
        place = work.checkpoint
        assert place is not None
        weights = translated(checkpoint.read_weights(place), model.state_dict())
        _check_head(model, weights, len(work.classes), place)
        checkpoint.fit(model, weights, str(place))
        if recipe.train.sparsity != "none" and recipe.train.epochs:  # sparse learning begins with a trained network
            history = trained(work, model, recipe.train, "train").history
    elif recipe.backbone.pretrained and recipe.train.epochs == 0:
        pretrained = getattr(model, "pretrained_cfg", None) or {}
        if pretrained.get("num_classes") != len(work.classes):
            raise PruneError(
                f"backbone.pretrained: timm's weights have {pretrained.get('num_classes')} classes, the data has "
                f"{len(work.classes)}: the head would be random. Set train.epochs to train it."
            )
    else:
        if recipe.train.epochs == 0:
            raise PruneError(
                "there is no dense network: set backbone.checkpoint=FILE, or train.epochs to train one, "
                "or backbone.pretrained=true to let timm fetch its weights"
            )
        history = trained(work, model, recipe.train, "train").history
    facts = {"history": history, "selection": recipe.train.selection}
    return Made(facts, {"dense.safetensors": (model.state_dict(), {})}, drop=("train_checkpoints",))


def _check_head(model: nn.Module, weights: Mapping[str, Tensor], classes: int, place: Path) -> None:
    head = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    name = next((n for n, module in model.named_modules() if module is head), None)
    found = weights.get(f"{name}.weight")
    if found is not None and found.shape[0] != classes:
        raise PruneError(
            f"class count mismatch: the data has {classes} classes, the head {name!r} of {place} has {found.shape[0]}. "
            "Use the data set that the checkpoint was trained on, or leave backbone.checkpoint out to train."
        )

"""The dense network: weights from elsewhere as they are, or trained here, from them or from nothing."""

from torch import nn

from dist_prune.errors import PruneError
from dist_prune.runtime import checkpoint
from dist_prune.runtime.backbones.foreign import translated
from dist_prune.runtime.data.numbering import warning
from dist_prune.stages.fitting import trained
from dist_prune.stages.work import Made, Work


def act(work: Work) -> Made:
    """-> dense.safetensors"""
    recipe, spec = work.recipe, work.recipe.backbone
    model = work.fresh()
    if spec.checkpoint:
        _load(work, model)
    elif spec.pretrained:
        _fetched(work, model)
    elif recipe.train.epochs == 0:
        raise PruneError(
            "there is no dense network: set backbone.checkpoint=FILE, or train.epochs to train one, "
            "or backbone.pretrained=true to let timm fetch its weights"
        )
    history = trained(work, model, recipe.train, "train").history if recipe.train.epochs else []
    facts = {"history": history, "selection": recipe.train.selection}
    return Made(facts, {"dense.safetensors": (model.state_dict(), {})}, drop=("train_checkpoints",))


def _load(work: Work, model: nn.Module) -> None:
    """The checkpoint's weights; where a training follows, a head of other classes stays new."""
    place, spec, trains = work.checkpoint, work.recipe.backbone, work.recipe.train.epochs > 0
    assert place is not None
    if spec.pretrained:
        _say(work, "backbone.checkpoint names the weights: timm's own (backbone.pretrained) are not fetched")
    wanted = model.state_dict()
    weights = checkpoint.read_weights(
        place, spec.checkpoint_key, spec.checkpoint_skip, wanted, lambda text: _say(work, text)
    )
    weights = translated(weights, wanted)
    head, classes = head_of(model), len(work.classes)
    found = [weights[name].shape[0] for name in head if name in weights and weights[name].ndim]
    other = next((count for count in found if count != classes), None)
    where = ", ".join(sorted({name.rpartition(".")[0] for name in head}))
    if other is not None and not trains:
        raise PruneError(
            f"class count mismatch: the data has {classes} classes, the head {where!r} of {place} has {other}. "
            "Use the data set that the checkpoint was trained on, or set train.epochs: the head is made anew then, and "
            "the network trained from these weights"
        )
    new = head if trains and (other is not None or not found) else ()
    checkpoint.fit(model, weights, str(place), new)
    variances = [tensor for name, tensor in weights.items() if name.endswith("running_var")]
    if trains and variances and all(bool(((tensor - 1).abs() < 1e-3).all()) for tensor in variances):
        _say(
            work, f"every batch norm of {place.name} has the variance 1: folded into its neighbours, or never trained. "
            "A training counts anew and changes what the network computes",
        )  # fmt: skip
    if not new:
        _may_be_mixed_up(work, place.name)
    else:
        why = f"that of {place.name} has {other} classes" if other is not None else f"{place.name} has none"
        _new_head(work, where, why)


def _fetched(work: Work, model: nn.Module) -> None:
    """timm's weights are in the network already; PruneError where its head is random and no training follows."""
    classes = len(work.classes)
    config = getattr(model, "pretrained_cfg", None) or {}
    count, colours = config.get("num_classes"), (config.get("input_size") or (3,))[0]
    if count != classes and work.recipe.train.epochs == 0:
        raise PruneError(
            f"backbone.pretrained: timm's weights have {count} classes, the data has {classes}: the head would be "
            "random. Set train.epochs to train it."
        )
    if colours != work.in_chans:
        _say(work, f"timm's weights are for {colours} channels: it fits those of the first layer to {work.in_chans}")
    if count == classes:
        _may_be_mixed_up(work, "fetched by timm")
    else:
        where = ", ".join(sorted({name.rpartition(".")[0] for name in head_of(model)}))
        _new_head(work, where, f"that of timm's weights has {count} classes")


def _new_head(work: Work, where: str, why: str) -> None:
    _say(work, f"the head {where} is made anew for {len(work.classes)} classes ({why}), and learns by train.epochs")


def _may_be_mixed_up(work: Work, weights: str) -> None:
    """A head from elsewhere knows classes by their numbers alone."""
    data, source = work.recipe.data, work.opened[True].source
    text = warning(source.classes, data.class_order, data.class_map, weights) if source.side is None else ""
    if text:
        work.tracker.say(f"\n{'=' * 80}\n{text}\n{'=' * 80}\n")
        work.events.append({"stage": "train", "event": text})


def _say(work: Work, text: str) -> None:
    """To the user, and into the report."""
    work.tracker.say(f"  {text}")
    work.events.append({"stage": "train", "event": text})


def head_of(model: nn.Module) -> tuple[str, ...]:
    """Names in the network's state of its classifier, or of the several that distilled networks have."""
    get = getattr(model, "get_classifier", None)
    found = get() if callable(get) else None
    heads = found if isinstance(found, tuple | list) else (found,)
    names = [name for name, module in model.named_modules() if any(module is head for head in heads)]
    return tuple(entry for entry in model.state_dict() if any(entry.startswith(f"{name}.") for name in names))

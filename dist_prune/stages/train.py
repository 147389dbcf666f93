"""The dense network: weights from elsewhere as they are, or trained here, from them or from nothing."""

from torch import nn

from dist_prune.errors import PruneError
from dist_prune.runtime.data.numbering import warning
from dist_prune.runtime.dense_weights import head_of, load_checkpoint
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
    place, spec = work.checkpoint, work.recipe.backbone
    assert place is not None
    if spec.pretrained:
        _say(work, "backbone.checkpoint names the weights: timm's own (backbone.pretrained) are not fetched")
    why = load_checkpoint(
        model, place, spec, len(work.classes), work.recipe.train.epochs > 0, lambda text: _say(work, text)
    )
    if why:
        _new_head(work, ", ".join(sorted({name.rpartition(".")[0] for name in head_of(model)})), why)
    else:
        _may_be_mixed_up(work, place.name)


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
    text = warning(source.classes, data.class_order, data.class_map, weights) if source.fixed_size is None else ""
    if text:
        work.tracker.say(f"\n{'=' * 80}\n{text}\n{'=' * 80}\n")
        work.events.append({"stage": "train", "event": text})


def _say(work: Work, text: str) -> None:
    """To the user, and into the report."""
    work.tracker.say(f"  {text}")
    work.events.append({"stage": "train", "event": text})

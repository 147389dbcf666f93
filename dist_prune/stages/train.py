"""Stage ``train``, the first one: the dense network, loaded or trained.

backbone.checkpoint, timm's weights or the seed's, and train.epochs -> dense.safetensors
"""

from torch import nn

from dist_prune.data.class_order import class_order_warning
from dist_prune.errors import PruneError, abbreviate
from dist_prune.models.load_checkpoint import classifier_names, load_checkpoint
from dist_prune.pipeline.context import RunContext, StageOutput
from dist_prune.pipeline.stage_graph import DENSE
from dist_prune.pipeline.start_network import StartNetwork
from dist_prune.stages.training_setup import run_training


def run(context: RunContext) -> StageOutput:
    """Load or train the dense network; facts: the history of epochs.

    Raises:
        PruneError: The recipe names no weights and no training, or weights that do not fit the network.
    """
    recipe, spec = context.recipe, context.recipe.backbone
    model = context.networks.create_initial()
    if context.networks.start is not None:
        _start(context, context.networks.start)
    elif spec.checkpoint:
        _load(context, model)
    elif spec.pretrained:
        _check_fetched(context, model)
    elif recipe.train.epochs == 0:
        raise PruneError(
            "there is no dense network: set backbone.checkpoint=FILE, or train.epochs to train one, "
            "or backbone.pretrained=true to let timm fetch its weights"
        )
    history = run_training(context, model, recipe.train, "train").history if recipe.train.epochs else []
    facts = {"history": history, "selection": recipe.train.selection}
    return StageOutput(facts, {DENSE: (model.state_dict(), {})}, drop=("train_checkpoints",))


def _load(context: RunContext, model: nn.Module) -> None:
    """Load the checkpoint's weights; if a training follows, a head for other classes stays new."""
    checkpoint, spec = context.networks.checkpoint, context.recipe.backbone
    assert checkpoint is not None
    if spec.pretrained:
        _say(context, "backbone.checkpoint names the weights: the published ones (backbone.pretrained) are not fetched")
    classes, learns = len(context.images.classes), context.recipe.train.epochs > 0
    mismatch = load_checkpoint(model, checkpoint, spec, classes, learns, lambda text: _say(context, text))
    if mismatch:
        _new_head(context, ", ".join(sorted({name.rpartition(".")[0] for name in classifier_names(model)})), mismatch)
    else:
        _warn_of_class_order(context, checkpoint.name)


def _start(context: RunContext, start: StartNetwork) -> None:
    """Say what the run starts from; PruneError if the bundle's head does not fit the data and no training follows."""
    classes = context.images.classes
    _say(context, f"the network starts as that of {context.recipe.backbone.bundle}, which was pruned before")
    reason = start.mismatch(classes)
    if not reason:
        return
    if context.recipe.train.epochs == 0:
        order = " data.class_map names the classes in the bundle's order." if "order" in reason else ""
        raise PruneError(
            f"backbone.bundle: the data has the {len(classes)} classes {abbreviate(classes, 4)}; the head is another: "
            f"{reason}.{order} Use images of those classes, or set train.epochs: the head is made anew then, and the "
            "network trained from the bundle's weights"
        )
    _new_head(context, "of the bundle", reason)


def _check_fetched(context: RunContext, model: nn.Module) -> None:
    """PruneError if the head of a network with timm's weights is random and no training follows."""
    classes = len(context.images.classes)
    config = getattr(model, "pretrained_cfg", None) or {}
    if not config or config.get("num_classes") == 0:  # a user's own network knows its weights; a tower has no head
        return
    count, weight_channels = config.get("num_classes"), (config.get("input_size") or (3,))[0]
    if count != classes and context.recipe.train.epochs == 0:
        raise PruneError(
            f"backbone.pretrained: the weights have {count} classes, the data has {classes}: the head would be "
            "random. Set train.epochs to train it."
        )
    in_channels = context.images.in_channels
    if weight_channels != in_channels:
        _say(
            context,
            f"the weights are for {weight_channels} channels: timm fits those of the first layer to {in_channels}",
        )
    if count == classes:
        _warn_of_class_order(context, "fetched by name")
    else:
        where = ", ".join(sorted({name.rpartition(".")[0] for name in classifier_names(model)}))
        _new_head(context, where, f"that of the published weights has {count} classes")


def _new_head(context: RunContext, where: str, why: str) -> None:
    classes = len(context.images.classes)
    _say(context, f"the head {where} is re-initialised for {classes} classes ({why}) and trained by train.epochs")


def _warn_of_class_order(context: RunContext, weights: str) -> None:
    """Warn if class numbers may differ from those that a loaded head was trained with."""
    data, source = context.recipe.data, context.images.splits[True].source
    text = (
        class_order_warning(source.classes, data.class_order, data.class_map, weights)
        if source.fixed_size is None and not getattr(source, "numbered", False)
        else ""
    )
    if text:
        context.tracker.info(f"\n{'=' * 80}\n{text}\n{'=' * 80}\n")
        context.events.append({"stage": "train", "event": text})


def _say(context: RunContext, text: str) -> None:
    """Log a line and add it to the events."""
    context.tracker.info(f"  {text}")
    context.events.append({"stage": "train", "event": text})

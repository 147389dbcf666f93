"""A training run as the train and finetune acts need it: which images, which are judged, where the checkpoints lie."""

import copy
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from dist_prune.config.training import Training
from dist_prune.pruning.sparsity import penalty
from dist_prune.pruning.trial import sites_of
from dist_prune.runtime.evaluation import evaluate
from dist_prune.runtime.training.carrying import Carried
from dist_prune.runtime.training.loop import Loop
from dist_prune.runtime.training.states import States
from dist_prune.runtime.training.train import Trainer
from dist_prune.stages.context import RunContext


def trained(
    context: RunContext,
    model: nn.Module,
    settings: Training,
    name: str,
    teacher: nn.Module | None = None,
    masks: Mapping[str, Tensor] | None = None,
    rerun: int = 0,
    carried: Carried | None = None,
    leaves: bool = False,
) -> Trainer:
    """Train ``model`` in place by the recipe's ``train`` or ``finetune`` section; the trainer with what it found.

    Args:
        teacher: the dense network to distil from, or None.
        masks: parameter name -> bool mask; exact zeros where it is False.
        name: of figures and checkpoints; of a training between rounds it begins with the round's folder.
        rerun: added to the recipe's seed for order, augmentation and dropout; held-out images stay the same.
        carried: the state that the finetuning of the round before left, or None.
        leaves: whether this one's state is wanted (``left`` of the trainer).
    """
    machine, seed = context.environment, context.recipe.seed
    feed = context.images.loader(True)
    train, _ = context.images.training_split(settings)
    judge = judge_of(context, settings)
    before = (context.round - 1) * context.recipe.schedule.finetune_epochs
    loop = Loop(settings, feed, machine, context.tracker, seed + rerun, name, train, first=before)
    folder = context.run_dir / f"{name}_checkpoints" / (str(rerun) if rerun else "")
    states = States(folder, context.stage_fingerprint, settings.keep_checkpoints, context.tracker.say)
    judged = "holdout" if settings.selection == "holdout" else "test"
    trainer = Trainer(
        model, loop, judge, judged, states, len(context.images.classes), teacher, masks or {}, carried=carried,
        leaves=leaves,
    )  # fmt: skip
    if settings.sparsity != "none":
        channels = sites_of(copy.deepcopy(model).cpu().eval(), context.images.example_input)
        trainer.penalty = penalty(settings.sparsity, model, channels, settings.sparsity_weight)
    trainer.run()
    if trainer.resumed is not None:
        context.events.append({"stage": name, "event": "resumed", **trainer.resumed})
    return trainer


def judge_of(context: RunContext, settings: Training) -> Callable[[nn.Module], Mapping[str, float]]:
    """Top-1 and loss of a network on the images that choose among epochs: held-out or the test images."""
    images, batch, ranks = context.images, context.recipe.evaluate.batch, context.environment.ranks
    if settings.selection != "holdout":
        return lambda network: evaluate(network, images.loader(False), batch, ranks, context.tracker, "test images")
    _, held = images.training_split(settings)
    return lambda network: evaluate(network, images.loader(True), batch, ranks, context.tracker, "held out", held)

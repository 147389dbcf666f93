"""The training of the train and finetune stages: its images, the images that select an epoch, its checkpoints."""

import copy
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from dist_prune.config.training import Training
from dist_prune.pipeline.context import RunContext
from dist_prune.pruning.sparse_learning import sparsity_gradient
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.stages.measuring import Measure
from dist_prune.training.checkpoints import CheckpointManager
from dist_prune.training.loop import Loop
from dist_prune.training.optimizer_state import CarriedOptimizerState
from dist_prune.training.trainer import Trainer


def run_training(
    context: RunContext,
    model: nn.Module,
    settings: Training,
    name: str,
    teacher: nn.Module | None = None,
    masks: Mapping[str, Tensor] | None = None,
    rerun: int = 0,
    carried: CarriedOptimizerState | None = None,
    leaves: bool = False,
) -> Trainer:
    """Train ``model`` in place by the recipe's ``train`` or ``finetune`` section. All ranks call it.

    Args:
        context: The run.
        model: The bare network on the run's device.
        settings: The recipe's section of the training.
        name: Name of figures and checkpoints: "train", "finetune" or "round_N/finetune".
        teacher: The dense network to distil from, or None.
        masks: Parameter name -> bool mask of its shape; weights stay exact zeros where it is False.
        rerun: Number added to the recipe's seed for order, augmentation and dropout; held-out images stay the same.
        carried: The optimizer state that the previous round's finetuning left, or None.
        leaves: Whether the trainer has to keep its final optimizer state.

    Returns:
        The trainer after training, with its history and, if ``leaves``, its optimizer state.
    """
    environment, seed = context.environment, context.recipe.seed
    loader = context.images.loader(True)
    train, _ = context.images.training_split(settings)
    metric = selection_metric(context, settings, name)
    first_epoch = (context.round - 1) * context.recipe.schedule.finetune_epochs
    loop = Loop(settings, loader, environment, context.tracker, seed + rerun, name, train, first_epoch=first_epoch)
    folder = context.run_dir / f"{name}_checkpoints" / (str(rerun) if rerun else "")
    checkpoints = CheckpointManager(folder, context.stage_fingerprint, settings.keep_checkpoints, context.tracker.info)
    split = "holdout" if settings.selection == "holdout" else "test"
    trainer = Trainer(
        model,
        loop,
        metric,
        split,
        checkpoints,
        len(context.images.classes),
        teacher,
        masks or {},
        carried=carried,
        keep_state=leaves,
        task=context.task,
    )
    if settings.sparsity != "none":
        graph = trace_groups(copy.deepcopy(model).cpu().eval(), context.images.example_input)
        trainer.penalty = sparsity_gradient(settings.sparsity, model, graph, settings.sparsity_weight)
    trainer.run()
    if trainer.resumed is not None:
        context.events.append({"stage": name, "event": "resumed", **trainer.resumed})
    return trainer


def selection_metric(context: RunContext, settings: Training, name: str) -> Callable[[nn.Module], Mapping[str, float]]:
    """The metric that selects an epoch: the task's figures on the held-out images or on the test images.

    Args:
        context: The run.
        settings: The recipe's section of the training; its ``selection`` decides the images.
        name: Name of the training, for the progress and for the text of a run that is stopped here.

    Returns:
        A function from a network on the run's device to its figures. All ranks call it.
    """
    images, measure = context.images, Measure(context, selects=True)
    if settings.selection != "holdout":
        return lambda network: measure(network, f"{name}, test images")
    _, held = images.training_split(settings)
    return lambda network: measure(network, f"{name}, held-out images", held, images.loader(True))

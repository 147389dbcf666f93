"""Stage ``finetune``, after ``prune``: train the pruned network, between two rounds or after the last one.

    after the last round:  dense.safetensors, round_N/pruned.safetensors, plan.json -> finetuned.safetensors
    with a repair:         round_N/repaired.safetensors instead of round_N/pruned.safetensors
    between two rounds:    the same -> round_N/finetuned.safetensors, and round_N/optimizer_state.safetensors with
                           ``schedule.carry_optimizer``

With ``reruns`` the last finetuning runs several times with other seeds; the weights of the first one are kept.
"""

import statistics
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dist_prune.config.training import Training
from dist_prune.data.sampling import calibration_ids
from dist_prune.pipeline.context import RunContext, StageOutput, Tensors
from dist_prune.pipeline.stage_graph import FINETUNED, OPTIMIZER_CARRIED, OPTIMIZER_STATE, cut_weights, round_path
from dist_prune.pruning.plan.block_masks import weight_masks
from dist_prune.stages.measuring import Measure
from dist_prune.stages.training_setup import run_training, selection_metric
from dist_prune.tasks.classification import CLASSIFICATION
from dist_prune.tasks.primary import PrimaryFigure
from dist_prune.training.bn_recalibration import recalibrate_bn
from dist_prune.training.optimizer_state import CarriedOptimizerState
from dist_prune.training.trainer import Trainer


def run(context: RunContext) -> StageOutput:
    """Finetune the pruned network; facts: the history of epochs, and the accuracies of reruns."""
    if context.round < context.recipe.schedule.rounds:
        return _finetune_between_rounds(context)
    settings, reruns = context.recipe.finetune, context.recipe.reruns
    meta = {"plan": context.networks.plan(context.round).fingerprint}
    if settings.only_if_drop is not None and settings.epochs:
        drop = _drop(context)
        if drop <= settings.only_if_drop:
            primary = PrimaryFigure.of(context.task.description())
            cost = f"{primary.number(drop)} {'points ' if primary.percent else ''}of {primary.name}"
            context.tracker.info(f"  pruning cost {cost}, at most {settings.only_if_drop:g}: left as it is")
            if context.task.name == CLASSIFICATION.name:
                context.events.append({"stage": "finetune", "event": "not needed", "drop": drop})
            else:
                context.events.append({"stage": "finetune", "event": f"not finetuned, pruning cost only {cost}"})
            facts = {"history": [], "selection": settings.selection}
            return StageOutput(
                facts, {FINETUNED: (context.read_tensors(cut_weights(context.recipe, context.round)), meta)}
            )
    accuracies: list[float] = []
    state: dict[str, Tensor] = {}
    history: list[dict[str, float]] = []
    for rerun in range(reruns):
        model, trainer = _finetune(context, settings, "finetune", rerun)
        if rerun == 0:
            state, history = {n: tensor.cpu().clone() for n, tensor in model.state_dict().items()}, trainer.history
        if reruns > 1:
            accuracies.append(_primary(context, model))
            context.tracker.info(
                f"  rerun {rerun + 1} of {reruns}: {context.task.text(accuracies[-1])} on the test images"
            )
    facts: dict[str, Any] = {"history": history, "selection": settings.selection}
    if accuracies:
        spread = statistics.stdev(accuracies)
        facts["reruns"] = {context.task.primary: accuracies, "mean": statistics.mean(accuracies), "std": spread}
    return StageOutput(facts, {FINETUNED: (state, meta)}, drop=("finetune_checkpoints",))


def _drop(context: RunContext) -> float:
    """How much worse pruning made the primary figure, on the images that select epochs (held out, or the test ones)."""
    metric = selection_metric(context, context.recipe.finetune, "finetune")
    models = context.networks.load_dense(), _load_pruned(context)
    key, sign = context.task.primary, 1 if context.task.higher_is_better else -1
    dense, pruned = (metric(model.to(context.environment.device))[key] for model in models)
    return sign * (dense - pruned)


def _load_pruned(context: RunContext) -> nn.Module:
    return context.networks.load_pruned(cut_weights(context.recipe, context.round), context.round)


def _finetune_between_rounds(context: RunContext) -> StageOutput:
    """One finetuning by the recipe's finetune section, for ``schedule.finetune_epochs``."""
    settings, name = context.recipe.between, round_path(context.round, "finetune")
    model, trainer = _finetune(context, settings, name, leaves=context.recipe.schedule.carry_optimizer)
    meta = {"plan": context.networks.plan(context.round).fingerprint}
    tensors: Tensors = {round_path(context.round, FINETUNED): (model.state_dict(), meta)}
    if trainer.final_state is not None:
        tensors[round_path(context.round, OPTIMIZER_STATE)] = trainer.final_state.to_file()
    facts = {"history": trainer.history, "selection": settings.selection}
    return StageOutput(facts, tensors, drop=(f"{name}_checkpoints",))


def _finetune(
    context: RunContext, settings: Training, name: str, rerun: int = 0, leaves: bool = False
) -> tuple[nn.Module, Trainer]:
    """The pruned network, finetuned with the recipe's seed + ``rerun``; its masked weights stay exact zeros."""
    model, carried = _load_pruned(context), None
    if context.recipe.schedule.carry_optimizer and context.round > 1 and settings.epochs:
        carried = CarriedOptimizerState.from_file(context.path(round_path(context.round, OPTIMIZER_CARRIED)))
        model.load_state_dict(carried.tables.get("model", model.state_dict()))
    model.to(context.environment.device)
    if settings.recalibrate_bn:
        recipe, (trained_on, _) = context.recipe, context.images.training_split(settings)
        labels = context.images.loader(True).source.labels[trained_on]
        positions = calibration_ids(labels, settings.recalibrate_bn, recipe.seed, recipe.score.balance)
        loader, ids = context.images.for_scoring(trained_on[positions], context.method)
        recalibrate_bn(model, loader, ids, context.recipe.score.micro_batch, context.environment.comm, context.tracker)
        if carried is not None and "ema" in carried.tables:  # averages resume from the new statistics, not the old ones
            new = model.state_dict()
            ema = carried.tables["ema"]
            ema = {key: new[key].detach().cpu().clone() if "running_" in key else old for key, old in ema.items()}
            carried = replace(carried, tables={**carried.tables, "ema": ema})
    teacher = context.networks.load_teacher() if settings.distill else None
    plan, graph = context.networks.plan(context.round), context.networks.graph
    masks: dict[str, Tensor] = weight_masks(plan, graph, model.state_dict())
    return model, run_training(context, model, settings, name, teacher, masks, rerun, carried, leaves)


def _primary(context: RunContext, model: nn.Module) -> float:
    """The task's primary figure on the test images."""
    return Measure(context, selects=True)(model, "finetune, test images")[context.task.primary]

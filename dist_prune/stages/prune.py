"""Stage ``prune``, after ``select`` in each round: remove the plan's channels from the network.

    dense.safetensors (round 1) or round_{N-1}/finetuned.safetensors, round_N/scores.safetensors, round_N/plan.json
    -> round_N/pruned.safetensors, and round_N/optimizer_carried.safetensors with ``schedule.carry_optimizer``

The carried optimizer state is pruned along. A bundle that ``select.plan`` names contributes its own weights.
"""

from functools import partial
from pathlib import Path

import torch

from dist_prune.export import bundle
from dist_prune.pipeline.context import RunContext, StageOutput, Tensors
from dist_prune.pipeline.stage_graph import OPTIMIZER_CARRIED, OPTIMIZER_STATE, PRUNED, round_path
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.reinit import reinitialise
from dist_prune.stages.calibration import starting_network
from dist_prune.training.optimizer_state import CarriedOptimizerState


def run(context: RunContext) -> StageOutput:
    """Apply the round's plan to the network that the round starts from."""
    pruned = round_path(context.round, PRUNED)
    plan, plan_path = context.networks.plan(context.round), Path(context.recipe.select.plan or "").expanduser()
    started = context.networks.start is not None  # its weights are those of the dense network's place
    if context.recipe.select.plan and plan_path.is_dir() and not started:
        weights = bundle.load(plan_path).state_dict()
        context.tracker.info(f"  {plan_path} is a bundle: its weights are taken, nothing is pruned here")
        return StageOutput({}, {pruned: (weights, {"plan": plan.fingerprint})})
    model, cut = starting_network(context).eval(), plan
    graph = context.networks.round_graph(context.networks.graph, context.round)
    if context.round > 1:
        cut = Plan.from_json(context.path(round_path(context.round, "cut.json")).read_text())
    tensors: Tensors = {}
    if context.round > 1 and context.recipe.schedule.carry_optimizer:
        carried = CarriedOptimizerState.from_file(context.path(round_path(context.round - 1, OPTIMIZER_STATE)))
        carried = carried.prune(partial(surgeon.prune_tensors_like, model, graph, cut))
        tensors[round_path(context.round, OPTIMIZER_CARRIED)] = carried.to_file()
    surgeon.apply_plan(model, graph, cut)
    layers = context.method.layers_to_reinit(context.networks.graph)
    if layers:
        reinitialise(model, layers, context.recipe.seed)
        context.tracker.info(f"  new weights, as the released code does: {', '.join(layers)}")
        context.events.append({"stage": "prune", "event": "new weights", "layers": list(layers)})
    with torch.no_grad():
        model(context.images.example_input)
    return StageOutput({}, {pruned: (model.state_dict(), {"plan": plan.fingerprint}), **tensors})

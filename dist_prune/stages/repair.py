"""Stage ``repair``, after ``prune`` in each round, with a ``repair.method`` or ``select.norms: refit``.

    the network that the round started from, round_N/plan.json, round_N/pruned.safetensors
    -> round_N/repaired.safetensors

Weights are set in closed form from calibration images; labels are not read. A stopped repair resumes at its layer.
"""

from dataclasses import replace

from dist_prune.data.sampling import calibration_ids
from dist_prune.errors import PruneError
from dist_prune.pipeline.context import RunContext, StageOutput
from dist_prune.pipeline.stage_graph import PRUNED, REPAIRED, round_path
from dist_prune.pruning.plan.plan import Plan
from dist_prune.scoring.repair import Repairer
from dist_prune.stages.calibration import starting_network


def run(context: RunContext) -> StageOutput:
    """Repair the round's pruned network; facts: a line for each layer that was repaired.

    Raises:
        PruneError: The round's weights are a bundle's, which may have been finetuned, or no image can be read.
    """
    recipe, comm = context.recipe, context.environment.comm
    settings, device = recipe.repair, context.environment.device
    dense, plan = starting_network(context).to(device).eval(), context.networks.plan(context.round)
    graph = context.networks.round_graph(context.networks.graph, context.round)
    cut = plan
    if context.round > 1:
        cut = Plan.from_json(context.path(round_path(context.round, "cut.json")).read_text())
    small = context.networks.load_pruned(round_path(context.round, PRUNED), context.round).to(device).eval()
    pool, labels = context.images.loader(True), context.images.loader(True).source.labels
    ids = calibration_ids(labels, settings.images, recipe.seed, recipe.score.balance)
    pool = replace(pool, transform=replace(context.images.transform, schedule=()))
    loader, ids = context.images.readable(pool, ids)
    if not len(ids):
        raise PruneError("repair.images: none of the images can be read")
    partial = context.path(round_path(context.round, "partial_repair"))
    if comm.is_main:
        partial.mkdir(parents=True, exist_ok=True)
    repairer = Repairer(
        loader,
        ids,
        comm,
        context.tracker,
        settings.method,
        None if settings.ridge == "auto" else settings.ridge,
        settings.micro_batch,
        settings.memory_mb * 2**20,
        partial / "repair.safetensors",
        context.stage_fingerprint,
        recipe.select.norms,
    )
    lines = repairer.run(dense, small, graph, cut)
    return StageOutput(
        {"layers": lines, "images": len(ids)},
        {round_path(context.round, REPAIRED): (small.state_dict(), {"plan": plan.fingerprint})},
        drop=(round_path(context.round, "partial_repair"),),
    )

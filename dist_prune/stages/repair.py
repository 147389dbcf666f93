"""Stage ``repair``, after ``prune`` in each round, with a ``repair.method`` or ``select.norms: refit``.

    the network that the round started from, round_N/plan.json, round_N/pruned.safetensors
    -> round_N/repaired.safetensors

Weights are set in closed form from calibration images; labels are not read. A stopped repair resumes at its layer.
"""

from dist_prune.pipeline.context import RunContext, StageOutput
from dist_prune.pipeline.stage_graph import PRUNED, REPAIRED, round_path
from dist_prune.pruning.plan.plan import Plan
from dist_prune.stages.calibration import repairer_of, starting_network


def run(context: RunContext) -> StageOutput:
    """Repair the round's pruned network; facts: a line for each layer that was repaired.

    Raises:
        PruneError: The round's weights are a bundle's, which may have been finetuned, or no image can be read.
    """
    comm, device = context.environment.comm, context.environment.device
    dense, plan = starting_network(context).to(device).eval(), context.networks.plan(context.round)
    graph = context.networks.round_graph(context.networks.graph, context.round)
    cut = plan
    if context.round > 1:
        cut = Plan.from_json(context.path(round_path(context.round, "cut.json")).read_text())
    small = context.networks.load_pruned(round_path(context.round, PRUNED), context.round).to(device).eval()
    partial = context.path(round_path(context.round, "partial_repair"))
    if comm.is_main:
        partial.mkdir(parents=True, exist_ok=True)
    repairer = repairer_of(context, comm, file=partial / "repair.safetensors")
    lines = repairer.run(dense, small, graph, cut)
    return StageOutput(
        {"layers": lines, "images": len(repairer.ids)},
        {round_path(context.round, REPAIRED): (small.state_dict(), {"plan": plan.fingerprint})},
        drop=(round_path(context.round, "partial_repair"),),
    )

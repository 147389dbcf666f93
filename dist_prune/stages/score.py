"""Stage ``score``, the first of each round: score channels on the calibration images, on all ranks.

    dense.safetensors (round 1) or round_{N-1}/finetuned.safetensors -> round_N/scores.safetensors

With ``score.from`` the scores of another run are taken; with ``select.plan`` nothing is scored.
"""

from pathlib import Path

import torch

from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError
from dist_prune.pipeline.context import RunContext, StageOutput
from dist_prune.pipeline.recipe_checks import finished_scores
from dist_prune.pipeline.stage_graph import round_path
from dist_prune.scoring.block_change import block_changes
from dist_prune.stages.calibration import scoring_context

SCORES = round_path(1, "scores.safetensors")


def run(context: RunContext) -> StageOutput:
    """Score the network that the round starts from; facts: the number of calibration images."""
    scores_file, partial = round_path(context.round, "scores.safetensors"), round_path(context.round, "partial")
    if context.recipe.select.plan:
        context.tracker.info("  select.plan names a plan: nothing is scored")
        return StageOutput({"images": 0}, {scores_file: ({"calibration_ids": torch.zeros(0, dtype=torch.int64)}, {})})
    add_cautions(context)
    if context.recipe.score.from_ and context.round == 1:
        return _take_scores(context, Path(context.recipe.score.from_))
    graph = context.networks.round_graph(context.networks.graph, context.round)
    scoring = scoring_context(context, graph, context.run_dir / partial)
    scores = {**context.method.score(scoring), **block_changes(scoring)}
    if scoring.resumed:
        context.events.append({"stage": "score", "event": "resumed", "images_before": scoring.resumed})
    for note in sorted({note for notes in context.environment.comm.all_gather_object(scoring.notes) for note in notes}):
        context.events.append({"stage": "score", "event": note})
    facts = {"images": scoring.images}
    tensors = {**scores, "calibration_ids": torch.from_numpy(scoring.ids)}
    return StageOutput(facts, {scores_file: (tensors, {"method": context.recipe.method["name"]})}, drop=(partial,))


def add_cautions(context: RunContext) -> None:
    """Log the method's cautions about badly chosen options, and add them to the events. ``check`` shows them too."""
    if context.recipe.choice and context.round == 1:
        context.events.append({"stage": "score", "event": context.recipe.choice})
    graph = context.networks.round_graph(context.selection_graph(), context.round)
    for text in context.method.cautions(graph):
        context.tracker.info(f"  warning: {text}")
        context.events.append({"stage": "score", "event": f"warning: {text}"})


def _take_scores(context: RunContext, other: Path) -> StageOutput:
    """The scores of another run, if they are the ones that this run would compute."""
    line = finished_scores(other)
    if line["fingerprint"] != context.stage_fingerprint:
        raise PruneError(
            f"score.from: the scores of {other} were made from another backbone, dense weights, data, seed, "
            "calibration images or method; only select, target and finetune keys may differ. "
            "Leave score.from out to score here."
        )
    tensors, meta = tensor_files.read_tensors(other / SCORES)
    context.events.append({"stage": "score", "event": "taken", "from": str(other)})
    return StageOutput({**line["facts"], "from": str(other)}, {SCORES: (tensors, meta)})

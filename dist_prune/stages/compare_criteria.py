"""Stage ``many``, after ``train`` and before ``score``: compare several criteria at the same target.

    dense.safetensors -> criteria.json, criteria.safetensors

Each criterion of ``score.compare`` is scored and selects a plan. The stage reports what the plans keep and the accuracy
of the pruned networks without finetuning. Accuracy is measured on training images that ``train.holdout`` holds out,
less those that a criterion was scored on: test images that choose a criterion no longer test its network. With
``repair.method`` each network is also repaired, by other images, and measured again.
"""

import copy
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_prune.data.loader import ImageLoader
from dist_prune.data.sampling import calibration_ids
from dist_prune.errors import PruneError
from dist_prune.methods.base import Method, Scores
from dist_prune.pipeline.context import RunContext, StageOutput
from dist_prune.pipeline.criteria import build_criterion
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.cost import report_costs
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.joint_pass import score_many
from dist_prune.stages.calibration import repairer_of, scoring_context
from dist_prune.stages.measuring import Measure
from dist_prune.tasks.base import Task

PARTIAL = "many_partial"


def run(context: RunContext) -> StageOutput:
    """Compare the criteria of ``score.compare``; facts: the table, and the images it was measured on."""
    criteria = {name: build_criterion(context, name) for name in context.recipe.score.compare}
    graph = trace_groups(
        context.networks.create().eval(),
        context.images.example_input,
        context.recipe.backbone.protect,
        context.recipe.backbone.streams,
        context.recipe.backbone.units,
    )
    scores, used = score_criteria(context, graph, criteria)
    loader, ids, where = comparison_images(context, used)
    title = context.task.figure_name
    context.tracker.info(f"  score.compare: {title} on {len(ids)} {where}")
    context.events.append({"stage": "many", "event": f"{title} of score.compare is measured on {len(ids)} {where}"})
    dense = context.networks.load_dense().eval()
    plans, table, measure = {}, [], Measure(context)

    def figure(network: nn.Module, what: str) -> float:
        return measure(network, what, ids, loader)[context.task.primary]

    repairer = None
    if context.recipe.repairs:
        repairer = repairer_of(context, context.environment.comm, apart=ids)
    for name, method in criteria.items():
        graph = method.prepare(method.prunable(graph), context.recipe.select.exclude, context.selection)
        with torch.no_grad():
            plans[name] = plan = method.select(scores[name], graph, context.selection)
            for text in method.warnings(scores[name], graph):
                context.tracker.info(f"  warning: {name}: {text}")
                context.events.append({"stage": "many", "event": f"warning: {name}: {text}"})
        model = copy.deepcopy(dense)
        surgeon.apply_plan(model, graph, plan)
        model.to(context.environment.device)
        shares = {cost.name: cost.share(graph, plan.counts) for cost in report_costs()}
        table.append({"method": name, context.task.primary: figure(model, f"evaluate {name}"), **shares})
        if repairer is not None:
            repairer.run(dense.to(context.environment.device), model, graph, plan)
            table[-1]["repaired"] = figure(model, f"evaluate {name}, repaired")
    for row in table:
        row["overlap"] = {name: kept_overlap(plans[row["method"]], plans[name]) for name in criteria}
        context.tracker.info("  " + summary_line(row, context.task))
    tensors = {
        f"{name}/{key}": tensor
        for name, tensors_of_criterion in scores.items()
        for key, tensor in tensors_of_criterion.items()
    }
    text = json.dumps(
        {
            "table": table,
            "images": {"count": len(ids), "where": where},
            "plans": {n: json.loads(p.to_json()) for n, p in plans.items()},
        },
        indent=1,
    )
    facts = {"table": table, "images": f"{len(ids)} {where}"}
    return StageOutput(facts, {"criteria.safetensors": (tensors, {})}, {"criteria.json": text}, drop=(PARTIAL,))


def score_criteria(
    context: RunContext, graph: DependencyGraph, criteria: Mapping[str, Method]
) -> tuple[dict[str, Scores], np.ndarray]:
    """Score each criterion, in one joint pass for all that use the same images in the same way.

    Args:
        context: The run.
        graph: Dependency graph of the dense network.
        criteria: Name -> method.

    Returns:
        Name -> scores; and the ids of the held-out training images that criteria were scored on, (n,) int64.
    """
    names_by_images: dict[tuple[str, bool], list[str]] = {}
    for name, method in criteria.items():
        names_by_images.setdefault((method.calibration_split, method.augmented), []).append(name)
    scores: dict[str, Scores] = {}
    used = np.zeros(0, dtype=np.int64)
    for (split, augmented), names in names_by_images.items():
        partial = context.run_dir / PARTIAL / (f"{split}_augmented" if augmented else split)
        scoring = scoring_context(context, graph, partial, criteria[names[0]])
        scores |= score_many(scoring, {name: criteria[name] for name in names})
        used = np.union1d(used, scoring.ids) if split == "held_out" else used
    return {name: scores[name] for name in criteria}, used


def comparison_images(context: RunContext, used: np.ndarray) -> tuple[ImageLoader, np.ndarray, str]:
    """The images on which criteria are compared.

    Args:
        context: The run.
        used: Ids of the held-out images that criteria were scored on; they are avoided if others are left.

    Returns:
        Their loader, their ids (ascending, (n,) int64), and a description with its caveats.

    Raises:
        PruneError: None of the images can be read.
    """
    loader, (holdout, learning) = context.images.loader(True), context.images.holdout()
    unused = np.setdiff1d(holdout, used)
    where = "training images that train.holdout holds out"
    if not len(unused):
        unused, where = (
            holdout,
            f"{where}, on which some of the criteria were measured as well (score.images takes all)",
        )
    if context.networks.checkpoint is not None:
        where += "; backbone.checkpoint may have been trained on them"
    elif "train" in learning:
        where += "; the dense network was trained on them (train.selection is not holdout)"
    limit = len(context.images.loader(False))
    loader, ids = context.images.readable(
        loader, unused[calibration_ids(loader.source.labels[unused], limit, context.recipe.seed)]
    )
    if not len(ids):
        raise PruneError(f"score.compare: none of the {where} can be read")
    return loader, ids, where


def kept_overlap(plan: Plan, other: Plan) -> float:
    """Jaccard index of the channels that two plans keep, over the groups that either of them cuts; 1 if none does."""
    shared = union = 0
    for group in {*plan.removed, *other.removed}:
        kept, other_kept = set(plan.kept(group)), set(other.kept(group))
        shared, union = shared + len(kept & other_kept), union + len(kept | other_kept)
    return shared / union if union else 1.0


def summary_line(row: dict[str, Any], task: Task) -> str:
    """A row of the comparison as a line for the terminal.

    Args:
        row: ``method``, the primary figure under its name, ``macs`` as a share of the dense network's, ``overlap``
            (name -> share).
        task: The run's task.
    """
    shared = ", ".join(f"{name} {share:.2f}" for name, share in row["overlap"].items() if name != row["method"])
    repaired = f"  repaired {task.text(row['repaired'])}" if "repaired" in row else ""
    return (
        f"{row['method']:16} {task.text(row[task.primary])}{repaired}  macs {row['macs']:.3f}  kept in common: {shared}"
    )

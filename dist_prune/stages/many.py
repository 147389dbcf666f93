"""Several criteria on the same images, at the same target: what they keep, and what is left of the accuracy.

Accuracy is measured on training images that ``train.holdout`` holds out, less those that a criterion was measured on:
test images that chose a criterion would be no test of what it made.
"""

import copy
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dist_prune.errors import PruneError
from dist_prune.methods.method import Method, Scores
from dist_prune.onepass import score_many
from dist_prune.pruning import surgeon
from dist_prune.pruning.channels import Channels
from dist_prune.pruning.cost import tabled
from dist_prune.pruning.plan import Plan
from dist_prune.pruning.trial import sites_of
from dist_prune.runtime.data.dealing import calibration
from dist_prune.runtime.data.feed import Feed
from dist_prune.runtime.evaluation import evaluate
from dist_prune.stages.calibrating import calibrated
from dist_prune.stages.context import RunContext, StageOutput
from dist_prune.stages.criteria import built

PARTIAL = "many_partial"


def run(context: RunContext) -> StageOutput:
    """dense.safetensors -> criteria.json, criteria.safetensors"""
    chosen = {name: built(context, name) for name in context.recipe.score.compare}
    traced = sites_of(context.networks.create().eval(), context.images.example_input)
    scores, used = scored(context, traced, chosen)
    feed, ids, where = judges(context, used)
    context.tracker.say(f"  score.compare: top-1 on {len(ids)} {where}")
    context.events.append({"stage": "many", "event": f"top-1 of score.compare is that on {len(ids)} {where}"})
    dense = context.networks.load_dense().eval()
    plans, table = {}, []
    for name, method in chosen.items():
        channels = method.ready(method.limits(traced), context.recipe.select.exclude, context.selection)
        with torch.no_grad():
            plans[name] = plan = method.select(scores[name], channels, context.selection)
            for text in method.warnings(scores[name], channels):
                context.tracker.say(f"  warning: {name}: {text}")
                context.events.append({"stage": "many", "event": f"warning: {name}: {text}"})
        model = copy.deepcopy(dense)
        surgeon.operate(model, traced, plan)
        figures = evaluate(
            model.to(context.environment.device), feed, context.recipe.evaluate.batch, context.environment.ranks,
            context.tracker, f"evaluate {name}", ids,
        )  # fmt: skip
        shares = {cost.name: cost.share(traced, plan.counts) for cost in tabled()}
        table.append({"method": name, "top1": figures["top1"], **shares})
    for row in table:
        row["overlap"] = {name: overlap(plans[row["method"]], plans[name]) for name in chosen}
        context.tracker.say("  " + said(row))
    tensors = {f"{name}/{key}": tensor for name, own in scores.items() for key, tensor in own.items()}
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


def scored(context: RunContext, traced: Channels, chosen: Mapping[str, Method]) -> tuple[dict[str, Scores], np.ndarray]:
    """The scores of each method, one pass over the images for all that look at the same ones in the same way; ids of
    the training images that a method held out from training was measured on."""
    looks: dict[tuple[str, bool], list[str]] = {}
    for name, method in chosen.items():
        looks.setdefault((method.sees, method.augmented), []).append(name)
    found: dict[str, Scores] = {}
    used = np.zeros(0, dtype=np.int64)
    for (sees, augmented), names in looks.items():
        partial = context.run_dir / PARTIAL / (f"{sees}_augmented" if augmented else sees)
        bench = calibrated(context, traced, partial, chosen[names[0]])
        found |= score_many(bench, {name: chosen[name] for name in names})
        used = np.union1d(used, bench.ids) if sees == "held_out" else used
    return {name: found[name] for name in chosen}, used


def judges(context: RunContext, used: np.ndarray) -> tuple[Feed, np.ndarray, str]:
    """The images on which criteria are compared: feed, ids (ascending), and in words what they are and are worth."""
    feed, (held, seen) = context.images.loader(True), context.images.holdout()
    left = np.setdiff1d(held, used)
    where = "training images that train.holdout holds out"
    if not len(left):
        left, where = held, f"{where}, on which some of the criteria were measured as well (score.images takes all)"
    if context.networks.checkpoint is not None:
        where += "; backbone.checkpoint may have been trained on them"
    elif "train" in seen:
        where += "; the dense network was trained on them (train.selection is not holdout)"
    most = len(context.images.loader(False))
    feed, ids = context.images.readable(feed, left[calibration(feed.source.labels[left], most, context.recipe.seed)])
    if not len(ids):
        raise PruneError(f"score.compare: none of the {where} can be read")
    return feed, ids, where


def overlap(one: Plan, other: Plan) -> float:
    """Channels that both keep, as a share of those that either keeps, over the groups that either cuts."""
    both = either = 0
    for group in {*one.removed, *other.removed}:
        a, b = set(one.kept(group)), set(other.kept(group))
        both, either = both + len(a & b), either + len(a | b)
    return both / either if either else 1.0


def said(row: dict[str, Any]) -> str:
    """A line for the terminal."""
    shared = ", ".join(f"{name} {share:.2f}" for name, share in row["overlap"].items() if name != row["method"])
    return f"{row['method']:16} top-1 {row['top1']:6.2f} %  macs {row['macs']:.3f}  keeps in common: {shared}"

"""Several criteria on the same images, at the same target: what they keep, and what is left of the accuracy."""

import copy
import json
from typing import Any

import torch

from dist_prune.onepass import score_many
from dist_prune.pruning import surgeon
from dist_prune.pruning.cost import amount
from dist_prune.pruning.plan import Plan
from dist_prune.runtime.evaluation import evaluate
from dist_prune.stages.calibrating import calibrated
from dist_prune.stages.criteria import built
from dist_prune.stages.work import Made, Work

PARTIAL = "many_partial"


def act(work: Work) -> Made:
    """dense.safetensors -> many.json, many.safetensors"""
    chosen = {name: built(work, name) for name in work.recipe.score.many}
    traced = surgeon.sites_of(work.shell().eval(), work.example)
    scores = score_many(calibrated(work, traced, work.folder / PARTIAL), chosen)
    dense = work.dense().eval()
    plans, table = {}, []
    for name, method in chosen.items():
        channels = method.ready(method.limits(traced), work.recipe.select.exclude, work.request)
        with torch.no_grad():
            plans[name] = plan = method.select(scores[name], channels, work.request)
        model = copy.deepcopy(dense)
        surgeon.operate(model, traced, plan)
        figures = evaluate(
            model.to(work.machine.device), work.feed(False), work.recipe.evaluate.batch, work.machine.ranks,
            work.tracker, f"evaluate {name}",
        )  # fmt: skip
        shares = {q: amount(traced, q, plan.counts) / amount(traced, q) for q in ("macs", "params")}
        table.append({"method": name, "top1": figures["top1"], **shares})
    for row in table:
        row["overlap"] = {name: overlap(plans[row["method"]], plans[name]) for name in chosen}
        work.tracker.say("  " + said(row))
    tensors = {f"{name}/{key}": tensor for name, own in scores.items() for key, tensor in own.items()}
    text = json.dumps({"table": table, "plans": {n: json.loads(p.to_json()) for n, p in plans.items()}}, indent=1)
    return Made({"table": table}, {"many.safetensors": (tensors, {})}, {"many.json": text}, drop=(PARTIAL,))


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

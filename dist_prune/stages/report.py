"""Stage ``report``, the last one: report.json for programs, report.html for readers, figures for TensorBoard.

    plan.json, metrics.json, answers.safetensors, curves.csv, the ledger -> report.json, report.html

It runs in every run, even if all other stages are done.
"""

import csv
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from dist_prune.config.safe_parsing import read_json, strict_json
from dist_prune.pipeline.context import RunContext, StageOutput
from dist_prune.pipeline.ledger import flatten
from dist_prune.pipeline.stage_graph import ANSWERS, judges, round_path, stages_of_recipe
from dist_prune.pruning.figure_data import Curve, SimilarityMap
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.selection.cost import layer_macs, report_costs
from dist_prune.pruning.selection.schedule import round_config
from dist_prune.report import answers, figures, tables
from dist_prune.report.run_html import Exhibits, render_report
from dist_prune.stages import latency_target, report_images
from dist_prune.tasks.classification import CLASSIFICATION
from dist_prune.training.timing_noise import speedup

# Sections whose keys tell the runs of a sweep apart; the others are the same in it.
TELLING = ("score", "method", "select", "target", "schedule", "finetune", "reruns")
ALWAYS = ("seed", "backbone.name", "method.name", "finetune.epochs", "finetune.lr", "score.images", "select.threshold")
MORE = (("select", "table"), ("finetune", "reruns"))  # facts that only some runs have


def run(context: RunContext) -> StageOutput:
    """Make the report and print its table; facts: none."""
    found = answers_of(context)
    body = report_body(context, found)
    similarity_maps, curves = pictures(context)
    predictions = report_images.predictions(context)
    examples = report_images.examples(context, body.get("classes", []), found)
    exhibits = Exhibits(
        {name: _fact(context, name, "history") or [] for name in stage_labels(context) if _trains(name)},
        similarity_maps,
        curves,
        planes(context),
        predictions,
        context.task.legend(context.images.classes) if predictions else (),
        examples,
        _confusion(context, found),
        context.images.classes,
    )
    _tensorboard(context, body, similarity_maps)
    context.tracker.info("\n" + tables.table(body))
    folder = context.run_dir.resolve()
    context.tracker.info(
        f"\nreport       {folder / 'report.html'}\nbundle       {folder / 'export'}"
        f"   python -c \"import dist_prune; dist_prune.load('{context.run_dir / 'export'}')\""
        f"\nTensorBoard  tensorboard --logdir {context.run_dir / 'tensorboard'}"
    )
    text = yaml.safe_dump(body["recipe"], sort_keys=False)
    return StageOutput({}, texts={"report.json": strict_json(body), "report.html": render_report(body, text, exhibits)})


def planes(context: RunContext) -> list[dict[str, str]]:
    """The lines of curves.csv as dicts; none if no curves were requested."""
    return list(csv.DictReader((context.run_dir / "curves.csv").read_text().splitlines()))


def pictures(context: RunContext) -> tuple[list[SimilarityMap], list[Curve]]:
    """The method's similarity matrices and curves; none if a plan was replayed, which has no scores."""
    if context.recipe.select.plan:
        return [], []
    graph = context.selection_graph()
    cost = context.selection.cost
    if (
        cost is not None and cost.measured
    ):  # such a run has one round; the method selects again within the measured time
        graph = latency_target.with_times(graph, _fact(context, "select", "latency"))
    spec = context.recipe.schedule  # with the dense network's scores and the first round's selection
    first = round_config(context.selection, graph, 1, spec.rounds, spec.spacing)
    arguments = (context.read_tensors("round_1/scores.safetensors"), graph, first)
    return list(context.method.similarity_maps(*arguments)), list(context.method.curves(*arguments))


def answers_of(context: RunContext) -> dict[str, np.ndarray]:
    """What the networks answered; nothing in a run directory whose evaluation was of an earlier version."""
    line = context.ledger.last("evaluate")
    if line is None or ANSWERS not in line["outputs"]:
        return {}
    return {name: table.numpy() for name, table in context.read_tensors(ANSWERS).items()}


def _confusion(context: RunContext, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The confusion matrices before and after, of few classes."""
    count = len(context.images.classes)
    if count > answers.MATRIX or "labels" not in found:
        return {}
    kinds = [kind for kind in ("dense", "finetuned") if f"{kind}/predicted" in found]
    return {kind: answers.matrix(found["labels"], found[f"{kind}/predicted"], count) for kind in kinds}


def network_lines(graph: DependencyGraph, kept: Mapping[str, int]) -> list[dict[str, Any]]:
    """The convolutions and linear layers in order, dense and pruned.

    Args:
        graph: The dense network's dependency graph.
        kept: Group -> channels that it keeps.

    Returns:
        ``name``, ``kind``, ``group`` (may be empty) of each, and ``in``, ``out``, ``macs`` as [dense, pruned].
    """
    groups = {c.layer: group.name for group in graph.groups for c in group.couplings if c.side == "out"}
    before, after = graph.widths({}), graph.widths(kept)
    dense, left = layer_macs(graph), layer_macs(graph, kept)
    return [
        {
            "name": name,
            "kind": "depthwise" if graph.layers[name].depthwise else graph.layers[name].kind,
            "group": groups.get(name, ""),
            "in": [before[name][0], after[name][0]],
            "out": [before[name][1], after[name][1]],
            "macs": [dense[name], left[name]],
        }
        for name in dense
    ]


def report_body(context: RunContext, found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The body of report.json (docs/runs.md describes its keys).

    Args:
        context: The run.
        found: What the networks answered (``answers_of``).
    """
    plan, graph = context.networks.plan(context.round), context.networks.graph
    metrics = json.loads((context.run_dir / "metrics.json").read_text())
    inside = graph.inside(plan.blocks_removed)
    groups = [
        {
            "name": group.name,
            "layers": list(group.layers),
            "width": group.width,
            "unit": group.unit,
            "kept": 0 if group.name in inside else plan.counts[group.name],
            "reason": "" if group.name in inside else plan.reasons.get(group.name, ""),
        }
        for group in graph.groups
    ]
    target = context.recipe.target.asked()
    environment = json.loads((context.run_dir / "environment.json").read_text())
    stages, rounds = stage_labels(context), context.recipe.schedule.rounds
    lines = {name: context.ledger.last(name) for name in stages}
    skipped = [event for event in context.events if event["event"] == "skipped"]
    return {
        "name": context.recipe.name,
        "recipe": context.recipe.written(),
        **({"expanded": context.recipe.expanded} if context.recipe.expanded else {}),
        **({} if context.task.name == CLASSIFICATION.name else {"task": context.task.description()}),
        "seed": context.recipe.seed,
        "world_size": environment["world_size"],
        "commit": environment.pop("commit"),
        "environment": environment,
        "images": context.images.description(),
        "skipped_images": {
            name: skipped_images for name in stages if (skipped_images := _fact(context, name, "skipped_images"))
        },
        **{name: metrics[name] for name in ("dense", "pruned", "repaired", "finetuned") if name in metrics},
        "plan": {
            "fingerprint": plan.fingerprint,
            "groups": groups,
            **({"blocks_removed": list(plan.blocks_removed)} if plan.blocks_removed else {}),
        },
        "network": network_lines(graph, plan.counts),
        **answers.summary(found, context.images.classes),
        "target": dict([target]) if target else {},
        "achieved": _fact(context, _last_selection(context), "achieved"),
        **({"rounds": metrics["rounds"]} if rounds > 1 else {}),
        **{key: _fact(context, stage, key) for stage, key in MORE if _fact(context, stage, key)},
        **({"search": found} if (found := _search(context)) else {}),
        **({"memory": memory} if (memory := _fact(context, _last_selection(context), "memory")) else {}),
        "communication": {name: line["said"] for name, line in lines.items() if line and line.get("said")},
        **({"many": _fact(context, "many", "table")} if context.recipe.score.compare else {}),
        **({"many_images": _fact(context, "many", "images")} if context.recipe.score.compare else {}),
        "timings": {name: line["seconds"] for name, line in lines.items() if line},
        "events": [e for line in lines.values() if line for e in line.get("events", [])] + skipped,
    }


def _last_selection(context: RunContext) -> str:
    rounds = context.recipe.schedule.rounds
    return "select" if rounds == 1 else round_path(rounds, "select")


def _search(context: RunContext) -> dict[str, Any]:
    """What the last round's search found, and its candidates without their widths; empty if there was none."""
    found = _fact(context, _last_selection(context), "search") or {}
    if not judges(context.recipe) or not found:
        return found
    lines = read_json(context.path(round_path(context.recipe.schedule.rounds, "search.json")))["candidates"]
    return {**found, "lines": [{key: one for key, one in line.items() if key != "counts"} for line in lines]}


def stage_labels(context: RunContext) -> list[str]:
    """The labels of this run's stages in the ledger, in order, without curves and report."""
    return [s.label for s in stages_of_recipe(context.recipe) if s.name not in ("curves", "report")]


def _trains(label: str) -> bool:
    return label.rpartition("/")[2] in ("train", "finetune")


def _fact(context: RunContext, stage: str, name: str) -> Any:
    line = context.ledger.last(stage)
    return line["facts"].get(name) if line else None


def _tensorboard(context: RunContext, body: dict[str, Any], similarity_maps: list[SimilarityMap]) -> None:
    """Log kept channels and similarity matrices as images, the plan as a table, and the distinguishing keys."""
    groups, finetuned = body["plan"]["groups"], body["finetuned"]
    context.tracker.figure("plan/kept channels", figures.groups_figure(groups, width=5.5))
    lines = [f"| {g['name']} | {g['width']} | {g['kept']} | {g['reason'].replace('|', '/')} |" for g in groups]
    head = "| group | width | kept | why nothing was cut |\n| --- | --- | --- | --- |\n"
    context.tracker.text("plan/groups", f"{tables.target_text(body)}\n\n{head}" + "\n".join(lines))
    for similarity_map in similarity_maps:
        context.tracker.image(f"likeness/{similarity_map.group}", figures.similarity_image(similarity_map))
    sizes = [cost.name for cost in report_costs()]
    metrics = {
        f"final/{key}": float(finetuned[key])
        for key in (*context.task.titles, "loss", *sizes)
        if finetuned.get(key) is not None
    }
    for line in body.get("rounds", []):
        values = {key: value for key, value in line.items() if key != "round" and value is not None}
        context.tracker.scalars({f"rounds/{key}": float(value) for key, value in values.items()}, line["round"])
    for batch, times in body["dense"]["latency"].items():
        ratio = speedup(times, finetuned["latency"][batch])
        metrics |= {f"final/speedup_{batch}": ratio} if ratio is not None else {}
    context.tracker.hparams(distinguishing_keys(context), metrics)


def distinguishing_keys(context: RunContext) -> dict[str, Any]:
    """The recipe keys that tell runs apart: those that differ from their defaults, and those of ``ALWAYS``.

    Method, target, network and seed come first: tables of trackers keep this order.
    """
    changed = flatten(context.recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True))
    keys = {key for key in changed if key.split(".")[0] in TELLING} | {*ALWAYS}
    resolved = flatten(context.recipe.written())
    asked = context.recipe.target.asked()
    first = ("method.name", *([f"target.{asked[0]}"] if asked else []), "backbone.name", "seed")
    order = [*first, *sorted(keys - {*first})]
    return {key: resolved[key] for key in order if resolved.get(key) is not None}

"""Runs the stages of a run and writes their artifacts.

    dense.safetensors -> ( score -> select -> prune ) x rounds -> finetune -> evaluate -> export -> report

A stage is a function from artifacts to artifacts: ``run`` in its file of ``dist_prune/stages``. It returns a
``StageOutput`` and never asks for its rank. ``run_stage`` writes the output on the first rank and keeps the ledger.
"""

import importlib
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dist_prune.config.earlier_versions import fingerprint_fields
from dist_prune.config.recipe import Recipe
from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import describe_environment
from dist_prune.errors import PruneError
from dist_prune.fileio import canonical, digest, file_digest, write_atomic
from dist_prune.pipeline import external_inputs
from dist_prune.pipeline.artifact_store import make_or_take
from dist_prune.pipeline.context import RunContext, StageOutput
from dist_prune.pipeline.earlier_artifact_names import first_name
from dist_prune.pipeline.git import commit_of
from dist_prune.pipeline.ledger import CHECKPOINT_KEYS, pick
from dist_prune.pipeline.stage_graph import ORDER, SEARCHED, SHARED, Stage, judges, stages_of
from dist_prune.pruning.plan.files import manifest_of

# Stage name in ledgers -> file in dist_prune/stages, if the names differ.
MODULES = {"many": "compare_criteria", "curves": "information_curves"}

__all__ = ["ORDER", "Stage", "fingerprint", "run_stage", "stages_of"]


def fingerprint(stage: Stage, context: RunContext, growing: bool = True) -> str:
    """Digest of everything that decides a stage's result: recipe fields, inputs, identity of images and checkpoint.

    Args:
        stage: The stage; its input artifacts exist.
        context: The run.
        growing: Whether the options that only say how much is measured are included. The fingerprint without them is
            the one that single recorded measurements belong to.

    Returns:
        A sha256 in hexadecimal.

    Raises:
        PruneError: The images or the checkpoint are not those that an earlier run of the stage read.
    """
    tree = context.recipe.resolved()
    fields = pick(tree, stage.reads)
    for section in fields.keys() & {"train", "finetune"}:
        excluded = {*CHECKPOINT_KEYS, "epochs", "only_if_drop"} if stage.between else CHECKPOINT_KEYS
        fields[section] = {key: value for key, value in fields[section].items() if key not in excluded}
    if stage.name == "score":
        options = context.method.Options
        refinable = () if growing else options.refinable_options()
        fields |= pick(tree, ("method.name", *(f"method.{n}" for n in options.score_options() if n not in refinable)))
        if context.method.calibration_split == "held_out":
            fields |= pick(tree, ("train.holdout", "train.images"))
    if stage.name == "select" and context.selection.cost is not None:  # how a time is measured decides it
        fields |= pick(tree, context.selection.cost.decided_by)
    if stage.name == "select" and context.recipe.select.from_:
        fields["front"] = file_digest(Path(context.recipe.select.from_).expanduser() / SEARCHED)
    replayed = context.recipe.select.plan
    if replayed and stage.name in ("score", "select", "prune"):  # score makes an empty file, the others read it
        plan_path = Path(replayed).expanduser()
        if stage.name == "select" or (stage.name == "prune" and plan_path.is_dir()):
            fields["replayed"] = file_digest(manifest_of(plan_path))
        elif stage.name == "score":
            fields["replayed"] = True
    fields = fingerprint_fields(fields, tree["method"]["name"])
    inputs = {first_name(name): file_digest(context.path(name)) for name in stage.inputs}
    outside = external_inputs.digests(context, stage.name)
    external_inputs.check_unchanged(stage.label, context, outside)
    return digest(canonical({"stage": stage.label, "fields": fields, "inputs": inputs, "outside": outside}))


def run_stage(stage: Stage, context: RunContext) -> dict[str, Any]:
    """Run a stage, or skip it if the ledger proves that it is done. All ranks call it.

    Args:
        stage: The stage to run; the stages before it are done.
        context: The run. Its events grow by those of the stage.

    Returns:
        The stage's line of the ledger.

    Raises:
        PruneError: The stage cannot do what the recipe asks for, or the device is out of memory.
    """
    comm = context.environment.comm
    if stage.name == "many" and not context.recipe.score.compare:
        return {"stage": "many", "facts": {}}
    identity = comm.broadcast_object(comm.run_on_main(lambda: fingerprint(stage, context))) or ""
    done = comm.broadcast_object(comm.run_on_main(lambda: context.ledger.done(stage.label, identity)))
    if done is not None and not stage.always:
        context.tracker.info(f"{stage.label}: done before, skipped")
        context.events.append({"stage": stage.label, "event": "skipped"})
        return done
    context.tracker.info(f"{stage.label}: {_headline(stage, context)}")
    start = time.perf_counter()
    events_before = len(context.events)
    traffic_before = dict(comm.volume)
    context.stage_fingerprint, context.round = identity, stage.round
    if stage.name == "score":
        measured = comm.run_on_main(lambda: fingerprint(stage, context, growing=False))
        context.measurement_fingerprint = comm.broadcast_object(measured) or ""
    if not stage.always:
        comm.run_on_main(lambda: _begin(stage, context))
    facts, drop = _make_outputs(stage, context)
    for event in context.events[events_before:]:  # a stage knows its name, not its label
        event["stage"] = stage.label if event["stage"] == stage.name else event["stage"]
    line = {
        "stage": stage.label,
        "fingerprint": identity,
        "facts": facts,
        "world_size": comm.world,
        "outside": external_inputs.digests(context, stage.name) if comm.is_main else {},
        "events": context.events[events_before:],
        "seconds": round(time.perf_counter() - start, 3),
        "said": comm.traffic_since(traffic_before),
    }
    comm.run_on_main(lambda: context.ledger.append({**line, "outputs": _digests(context, stage.outputs)}))
    comm.run_on_main(lambda: _drop(context, drop))
    comm.barrier()
    return line


def _make_outputs(stage: Stage, context: RunContext) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Run the stage and write its artifacts, or take those of another task; (facts, files that may be deleted)."""
    comm, drop = context.environment.comm, SHARED.get(stage.label, ())

    def make() -> dict[str, Any]:
        nonlocal drop
        try:
            output: StageOutput = importlib.import_module(
                f"dist_prune.stages.{MODULES.get(stage.name, stage.name)}"
            ).run(context)
        except torch.OutOfMemoryError as error:
            raise PruneError(_out_of_memory(stage, context, error)) from error
        context.images.close_loaders()
        comm.run_on_main(lambda: _write(context, output))
        drop = output.drop
        return output.facts | _unreadable(stage, context)

    elsewhere = context.recipe.select.plan or context.recipe.score.from_
    store = context.artifact_store
    if store is None or stage.label not in SHARED or elsewhere:
        return make(), drop
    key = f"{stage.name}-{context.stage_fingerprint[:32]}"
    facts, other = make_or_take(store, key, stage.outputs, comm, make, context.run_dir, context.tracker.info)
    if other:
        context.tracker.info(f"  taken from {other}")
        context.events.append({"stage": stage.label, "event": "taken", "from": other})
    return facts, drop


def _unreadable(stage: Stage, context: RunContext) -> dict[str, Any]:
    """The fact that lists the images left out by the stage; adds an event for each split that lost some."""
    skipped = context.images.take_unreadable()
    for split in dict.fromkeys(image["images"] for image in skipped):
        count = sum(image["images"] == split for image in skipped)
        event = f"{count} {split} image(s) could not be read and were left out"
        context.events.append({"stage": stage.label, "event": event})
    return {"skipped_images": skipped} if skipped else {}


def _out_of_memory(stage: Stage, context: RunContext, error: torch.OutOfMemoryError) -> str:
    """The error text: the key to lower, and torch's own message."""
    recipe = context.recipe
    section = "between" if stage.between else stage.name
    training = f"lower {section}.batch, or raise {section}.accumulate (now {{}}), which leaves the batch as it is"
    advice = {
        "train": training.format(recipe.train.accumulate),
        "finetune": training.format((recipe.between if stage.between else recipe.finetune).accumulate),
        "score": f"lower score.micro_batch (now {recipe.score.micro_batch})",
        "many": f"lower score.micro_batch (now {recipe.score.micro_batch})",
        "repair": f"lower repair.memory_mb (now {recipe.repair.memory_mb}) or repair.micro_batch",
        "evaluate": f"lower evaluate.batch (now {recipe.evaluate.batch}) or report.latency_batches",
        "select": f"lower select.search.micro_batch (now {recipe.select.search.micro_batch})"
        if recipe.select.search
        else f"lower target.latency_batch (now {recipe.target.latency_batch})",
    }.get(stage.name, "use a device with more memory")
    reason = str(error).splitlines()[0].partition(" If reserved")[0]
    return f"{stage.label}: the device is out of memory; {advice}, or start more processes. {reason}"


def _begin(stage: Stage, context: RunContext) -> None:
    """Write environment.json, which describes the last run that made something, and note the stage's start."""
    body = describe_environment(context.environment) | {"commit": commit_of(Path(__file__))}
    write_atomic(context.run_dir / "environment.json", json.dumps(body, indent=1))
    external_inputs.record_start(stage.label, context, external_inputs.digests(context, stage.name))


def _write(context: RunContext, output: StageOutput) -> None:
    for name, (tensors, meta) in output.tensors.items():
        tensor_files.save_tensors(context.path(name), tensors, meta)
    for name, text in output.texts.items():
        write_atomic(context.path(name), text)


def _drop(context: RunContext, names: Iterable[str]) -> None:
    """Delete what the stage needed to resume; only after the stage is in the ledger."""
    for name in names:
        shutil.rmtree(context.run_dir / name, ignore_errors=True)


def _digests(context: RunContext, names: Iterable[str]) -> dict[str, str]:
    return {context.artifact(name): file_digest(context.path(name)) for name in names}


def _selecting(recipe: Recipe) -> str:
    search = recipe.select.search
    if recipe.select.from_:
        return f"the best network of {recipe.select.from_} within the target"
    if search is None:
        return "channels to keep"
    return f"a search of {search.candidates} candidates" if judges(recipe) else "channels to keep, by a knapsack"


def _headline(stage: Stage, context: RunContext) -> str:
    recipe = context.recipe
    return {
        "train": f"the dense {recipe.backbone.name}"
        + (" from its bundle" if recipe.backbone.bundle else "")
        + (" from its checkpoint" if recipe.backbone.checkpoint and not recipe.backbone.bundle else "")
        + (
            " from timm's weights"
            if recipe.backbone.pretrained and not recipe.backbone.checkpoint and not recipe.backbone.bundle
            else ""
        )
        + (f", {recipe.train.epochs} epochs" if recipe.train.epochs else ""),
        "many": f"{', '.join(recipe.score.compare)} in one pass",
        "score": "calibration images",
        "select": _selecting(recipe),
        "prune": "cut them out",
        "repair": f"{recipe.repair_name}, {recipe.repair.images:,} images without labels",
        "finetune": f"{recipe.between.epochs if stage.between else recipe.finetune.epochs} epochs",
        "evaluate": "dense, pruned, repaired and finetuned: accuracy, cost, time"
        if recipe.repairs
        else "dense, pruned and finetuned: accuracy, cost, time",
        "curves": "every number of kept filters, group by group"
        if recipe.information.curves != "none"
        else "none requested (information.curves)",
        "export": "the bundle",
        "report": "report.json and report.html",
    }[stage.name]

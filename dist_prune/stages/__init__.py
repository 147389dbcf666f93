"""The acts of a run, in order, and the artifacts that pass between them.

    dense.safetensors -> ( score -> select -> prune ) x rounds -> finetune -> evaluate -> export -> report

A stage is a function from artifacts to artifacts (``act`` in the file of its name). It returns what it made and never
asks which rank it is; ``perform`` writes, on the first rank, and keeps the ledger.
"""

import importlib
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dist_prune.compatibility import without_added
from dist_prune.errors import PruneError
from dist_prune.ledger import SAFETY, canonical, digest, file_digest, pick, write_atomic
from dist_prune.replay import manifest_of
from dist_prune.runtime import checkpoint
from dist_prune.runtime.machine import describe
from dist_prune.stages import outside
from dist_prune.stages.code import commit_of
from dist_prune.stages.order import ORDER, SHARED, Stage, order
from dist_prune.stages.sharing import made_once
from dist_prune.stages.work import Made, Work

__all__ = ["ORDER", "Stage", "fingerprint", "order", "perform"]


def fingerprint(stage: Stage, work: Work, growing: bool = True) -> str:
    """What the stage's result is decided by: recipe fields, digests of the inputs, identity of data and checkpoint.

    ``growing=False`` leaves out how much is measured: what single measurements belong to.
    """
    fields = pick(work.tree, stage.reads)
    for section in fields.keys() & {"train", "finetune"}:
        left_out = {*SAFETY, "epochs", "only_if_drop"} if stage.between else SAFETY
        fields[section] = {key: value for key, value in fields[section].items() if key not in left_out}
    if stage.name == "score":
        options = work.method.Options
        grown = () if growing else options.growing_options()
        fields |= pick(work.tree, ("method.name", *(f"method.{n}" for n in options.score_options() if n not in grown)))
        if work.method.sees == "held_out":
            fields |= pick(work.tree, ("train.holdout", "train.images"))
    if stage.name == "select" and work.request.cost is not None:  # how a time is measured decides it
        fields |= pick(work.tree, work.request.cost.decided_by)
    replayed = work.recipe.select.plan
    if replayed and stage.name in ("score", "select", "prune"):  # score makes an empty file, the others read it
        place = Path(replayed).expanduser()
        if stage.name == "select" or (stage.name == "prune" and place.is_dir()):
            fields["replayed"] = file_digest(manifest_of(place))
        elif stage.name == "score":
            fields["replayed"] = True
    fields = without_added(fields, work.tree["method"]["name"])
    inputs = {name: file_digest(work.folder / name) for name in stage.inputs}
    found = work.outside(stage.name)
    outside.same(stage.label, work, found)
    return digest(canonical({"stage": stage.label, "fields": fields, "inputs": inputs, "outside": found}))


def perform(stage: Stage, work: Work) -> dict[str, Any]:
    """Do a stage, or skip it because the ledger says it is done; returns the ledger's line."""
    ranks = work.machine.ranks
    if stage.name == "many" and not work.recipe.score.many:
        return {"stage": "many", "facts": {}}
    identity = ranks.from_first(ranks.together(lambda: fingerprint(stage, work))) or ""
    done = ranks.from_first(ranks.together(lambda: work.ledger.done(stage.label, identity)))
    if done is not None and not stage.always:
        work.tracker.say(f"{stage.label}: done before, skipped")
        work.events.append({"stage": stage.label, "event": "skipped"})
        return done
    work.tracker.say(f"{stage.label}: {_headline(stage, work)}")
    start, told, before = time.perf_counter(), len(work.events), dict(ranks.volume)
    work.identity, work.round = identity, stage.round
    if stage.name == "score":
        work.lineage = ranks.from_first(ranks.together(lambda: fingerprint(stage, work, growing=False))) or ""
    if not stage.always:
        ranks.together(lambda: _begin(stage, work))
    facts, drop = _make(stage, work)
    for event in work.events[told:]:  # an act knows its own name, not which round it is
        event["stage"] = stage.label if event["stage"] == stage.name else event["stage"]
    line = {
        "stage": stage.label, "fingerprint": identity, "facts": facts, "world_size": ranks.world,
        "outside": work.outside(stage.name) if ranks.first else {}, "events": work.events[told:],
        "seconds": round(time.perf_counter() - start, 3), "said": ranks.since(before),
    }  # fmt: skip
    ranks.together(lambda: work.ledger.append({**line, "outputs": _digests(work, stage.outputs)}))
    ranks.together(lambda: _drop(work, drop))
    ranks.wait()
    return line


def _make(stage: Stage, work: Work) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Do the act and write its artifacts, or take those of another task; (facts, what may go afterwards)."""
    ranks, drop = work.machine.ranks, SHARED.get(stage.label, ())

    def make() -> dict[str, Any]:
        nonlocal drop
        try:
            made: Made = importlib.import_module(f"{__name__}.{stage.name}").act(work)
        except torch.OutOfMemoryError as error:
            raise PruneError(_out_of_memory(stage, work, error)) from error
        work.close_feeds()
        ranks.together(lambda: _write(work, made))
        drop = made.drop
        return made.facts | work.left_out(stage.label)

    elsewhere = work.recipe.select.plan or work.recipe.score.from_
    if work.shelf is None or stage.label not in SHARED or elsewhere:
        return make(), drop
    key = f"{stage.name}-{work.identity[:32]}"
    facts, other = made_once(work.shelf, key, stage.outputs, ranks, make, work.folder, work.tracker.say)
    if other:
        work.tracker.say(f"  taken from {other}")
        work.events.append({"stage": stage.label, "event": "taken", "from": other})
    return facts, drop


def _out_of_memory(stage: Stage, work: Work, error: torch.OutOfMemoryError) -> str:
    """Which key to lower, beside what torch says of the memory."""
    recipe = work.recipe
    section = "between" if stage.between else stage.name
    training = f"lower {section}.batch, or raise {section}.accumulate (now {{}}), which leaves the batch as it is"
    advice = {
        "train": training.format(recipe.train.accumulate),
        "finetune": training.format((recipe.between if stage.between else recipe.finetune).accumulate),
        "score": f"lower score.micro_batch (now {recipe.score.micro_batch})",
        "many": f"lower score.micro_batch (now {recipe.score.micro_batch})",
        "evaluate": f"lower evaluate.batch (now {recipe.evaluate.batch}) or report.latency_batches",
        "select": f"lower target.latency_batch (now {recipe.target.latency_batch})",
    }.get(stage.name, "use a device with more memory")
    said = str(error).splitlines()[0].partition(" If reserved")[0]
    return f"{stage.label}: the device is out of memory; {advice}, or start more processes. {said}"


def _begin(stage: Stage, work: Work) -> None:
    """environment.json tells of the last process that made something, not of one that found everything done."""
    body = describe(work.machine) | {"commit": commit_of(Path(__file__))}
    write_atomic(work.folder / "environment.json", json.dumps(body, indent=1))
    outside.begin(stage.label, work, work.outside(stage.name))


def _write(work: Work, made: Made) -> None:
    for name, (tensors, meta) in made.tensors.items():
        checkpoint.save(work.folder / name, tensors, meta)
    for name, text in made.texts.items():
        write_atomic(work.folder / name, text)


def _drop(work: Work, names: Iterable[str]) -> None:
    """What was kept to resume goes only when the stage is on record."""
    for name in names:
        shutil.rmtree(work.folder / name, ignore_errors=True)


def _digests(work: Work, names: Iterable[str]) -> dict[str, str]:
    return {name: file_digest(work.folder / name) for name in names}


def _headline(stage: Stage, work: Work) -> str:
    recipe = work.recipe
    return {
        "train": f"the dense {recipe.backbone.name}"
        + (" from its checkpoint" if recipe.backbone.checkpoint else "")
        + (" from timm's weights" if recipe.backbone.pretrained and not recipe.backbone.checkpoint else "")
        + (f", {recipe.train.epochs} epochs" if recipe.train.epochs else ""),
        "many": f"{', '.join(recipe.score.many)} in one pass",
        "score": "calibration images",
        "select": "channels to keep",
        "prune": "cut them out",
        "finetune": f"{recipe.between.epochs if stage.between else recipe.finetune.epochs} epochs",
        "evaluate": "dense, pruned and finetuned: accuracy, cost, time",
        "curves": "every number of kept filters, group by group"
        if recipe.information.curves != "none"
        else "none asked for (information.curves)",
        "export": "the bundle",
        "report": "report.json and report.html",
    }[stage.name]

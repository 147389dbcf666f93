"""Score the network that a round starts from on the calibration images, on all ranks."""

from pathlib import Path

import torch

from dist_prune.errors import PruneError
from dist_prune.foreseen import finished
from dist_prune.runtime import checkpoint
from dist_prune.stages.calibrating import calibrated
from dist_prune.stages.order import at
from dist_prune.stages.work import Made, Work

SCORES = at(1, "scores.safetensors")


def act(work: Work) -> Made:
    """dense.safetensors, or what the round before left -> round_N/scores.safetensors"""
    place, partial = work.here("scores.safetensors"), work.here("partial")
    if work.recipe.select.plan:
        work.tracker.say("  select.plan names a plan: nothing is scored")
        return Made({"images": 0}, {place: ({"calibration_ids": torch.zeros(0, dtype=torch.int64)}, {})})
    cautioned(work)
    if work.recipe.score.from_ and work.round == 1:
        return _from(work, Path(work.recipe.score.from_))
    bench = calibrated(work, work.left(work.channels), work.folder / partial)
    scores = work.method.score(bench)
    if bench.resumed:
        work.events.append({"stage": "score", "event": "resumed", "images_before": bench.resumed})
    for note in sorted({note for notes in work.machine.ranks.gather(bench.notes) for note in notes}):
        work.events.append({"stage": "score", "event": note})
    facts = {"images": bench.images}
    tensors = {**scores, "calibration_ids": torch.from_numpy(bench.ids)}
    return Made(facts, {place: (tensors, {"method": work.recipe.method["name"]})}, drop=(partial,))


def cautioned(work: Work) -> None:
    """Say, and note for the report, what is known to be badly chosen before any work: what ``check`` says too."""
    channels = work.left(work.method.ready(work.channels, work.recipe.select.exclude, work.request))
    for text in work.method.cautions(channels):
        work.tracker.say(f"  warning: {text}")
        work.events.append({"stage": "score", "event": f"warning: {text}"})


def _from(work: Work, other: Path) -> Made:
    """The scores of another run, where they are the ones this run would compute."""
    line = finished(other)
    if line["fingerprint"] != work.identity:
        raise PruneError(
            f"score.from: the scores of {other} were made from another backbone, dense weights, data, seed, "
            "calibration images or method; only select, target and finetune keys may differ. "
            "Leave score.from out to score here."
        )
    tensors, meta = checkpoint.read(other / SCORES)
    work.events.append({"stage": "score", "event": "taken", "from": str(other)})
    return Made({**line["facts"], "from": str(other)}, {SCORES: (tensors, meta)})

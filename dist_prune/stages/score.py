"""Score the dense network on the calibration images, on all ranks."""

from pathlib import Path

import torch

from dist_prune.bench import Bench
from dist_prune.errors import PruneError
from dist_prune.ledger import Ledger
from dist_prune.runtime import checkpoint
from dist_prune.runtime.data.dealing import calibration
from dist_prune.stages.work import Made, Work

SCORES, PARTIAL, RECORD = "round_1/scores.safetensors", "round_1/partial", "round_1/measured.jsonl"


def act(work: Work) -> Made:
    """dense.safetensors -> round_1/scores.safetensors"""
    if work.recipe.select.plan:
        work.tracker.say("  select.plan names a plan: nothing is scored")
        return Made({"images": 0}, {SCORES: ({"calibration_ids": torch.zeros(0, dtype=torch.int64)}, {})})
    if work.recipe.score.from_:
        return _from(work, Path(work.recipe.score.from_))
    recipe, labels = work.recipe, work.feed(work.method.sees != "test").source.labels
    model, pool = work.dense().to(work.machine.device), work.pool()
    ids = pool[calibration(labels[pool], recipe.score.images, recipe.seed, recipe.score.balance)]
    if isinstance(recipe.score.images, int) and len(ids) < recipe.score.images:
        work.tracker.say(f"  score.images asks for {recipe.score.images} images; there are {len(ids)}, all are used")
    feed, ids = work.scoring(ids)
    if not len(ids):
        raise PruneError(
            f"score.images: none of the calibration images can be read ({next(iter(feed.skipped.values()))})"
        )
    bench = Bench(
        model, work.channels, feed, ids, work.machine, work.tracker, recipe.score.micro_batch, recipe.seed,
        work.folder / PARTIAL, work.identity, recipe.score.save_every,
        record=Path(recipe.score.record).expanduser() if recipe.score.record else work.folder / RECORD,
        lineage=work.lineage, augmented=work.method.augmented,
    )  # fmt: skip
    scores = work.method.score(bench)
    if bench.resumed:
        work.events.append({"stage": "score", "event": "resumed", "images_before": bench.resumed})
    for note in sorted({note for notes in work.machine.ranks.gather(bench.notes) for note in notes}):
        work.events.append({"stage": "score", "event": note})
    facts = {"images": len(ids)}
    tensors = {**scores, "calibration_ids": torch.from_numpy(ids)}
    return Made(facts, {SCORES: (tensors, {"method": recipe.method["name"]})}, drop=(PARTIAL,))


def _from(work: Work, other: Path) -> Made:
    """The scores of another run, where they are the ones this run would compute."""
    line = Ledger(other).last("score")
    if line is None or Ledger(other).done("score", line["fingerprint"]) is None:
        raise PruneError(
            f"score.from: {other} has no finished scores ({SCORES}, unchanged since its line in ledger.jsonl)"
        )
    if line["fingerprint"] != work.identity:
        raise PruneError(
            f"score.from: the scores of {other} were made from another backbone, dense weights, data, seed, "
            "calibration images or method; only select, target and finetune keys may differ. "
            "Leave score.from out to score here."
        )
    tensors, meta = checkpoint.read(other / SCORES)
    work.events.append({"stage": "score", "event": "taken", "from": str(other)})
    return Made({**line["facts"], "from": str(other)}, {SCORES: (tensors, meta)})

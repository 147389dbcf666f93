"""The bench of a run: the network that a round scores, and the calibration images that the recipe draws."""

from pathlib import Path

from dist_prune.bench import Bench
from dist_prune.errors import PruneError
from dist_prune.pruning.channels import Channels
from dist_prune.runtime.data.dealing import calibration
from dist_prune.stages.work import Work

RECORD = "measured.jsonl"


def calibrated(work: Work, channels: Channels, partial: Path) -> Bench:
    """``partial``: the folder of what a stopped process had seen."""
    recipe, labels = work.recipe, work.feed(work.method.sees != "test").source.labels
    model, pool = work.before().to(work.machine.device), work.pool()
    ids = pool[calibration(labels[pool], recipe.score.images, recipe.seed, recipe.score.balance)]
    if isinstance(recipe.score.images, int) and len(ids) < recipe.score.images:
        work.tracker.say(f"  score.images asks for {recipe.score.images} images; there are {len(ids)}, all are used")
    feed, ids = work.scoring(ids)
    if not len(ids):
        raise PruneError(
            f"score.images: none of the calibration images can be read ({next(iter(feed.skipped.values()))})"
        )
    record = Path(recipe.score.record).expanduser() if recipe.score.record else work.folder / work.here(RECORD)
    return Bench(
        model, channels, feed, ids, work.machine, work.tracker, recipe.score.micro_batch, recipe.seed, partial,
        work.identity, recipe.score.save_every,
        record=record, lineage=work.lineage, augmented=work.method.augmented,
    )  # fmt: skip

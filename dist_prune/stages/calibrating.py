"""The bench of a run: the network that a round scores, and the calibration images that the recipe draws."""

from pathlib import Path

import numpy as np
from torch import nn

from dist_prune.bench import Bench
from dist_prune.errors import PruneError
from dist_prune.methods.method import TRAINED, Method
from dist_prune.pruning.channels import Channels
from dist_prune.runtime.data.dealing import calibration
from dist_prune.stages.work import Work

SCORES, RECORD = "scores.safetensors", "measured.jsonl"  # of a round


def pool(work: Work, method: Method) -> np.ndarray:
    """The images that calibration draws from; notes an event where images should be held out and are trained on."""
    if method.sees == "test":
        event = "channels are ranked by the test images: figures of the network on them are too good"
        work.tracker.say(f"  warning: {event}")
        work.events.append({"stage": "score", "event": event})
    if method.sees != "held_out":
        return np.arange(len(work.feed(method.sees == "train")))
    held, seen = work.held()
    if seen:
        event = f"the held-out images of scoring are trained on ({' and '.join(seen)}: selection is not holdout)"
        work.events.append({"stage": "score", "event": event})
    return held


def starting(work: Work) -> nn.Module:
    """The network that surgery starts from: what the round before left, or what the method trained while it scored."""
    model = work.before()
    if work.method.trains_weights and not work.recipe.select.plan:
        scores = work.tensors(work.here(SCORES))
        model.load_state_dict({n.removeprefix(TRAINED): t for n, t in scores.items() if n.startswith(TRAINED)})
    return model


def calibrated(work: Work, channels: Channels, partial: Path, other: Method | None = None) -> Bench:
    """``partial``: the folder of what a stopped process had seen. ``other``: a method to look at its images by, instead
    of the recipe's; its single measurements are not put on record."""
    method = other or work.method
    recipe, labels = work.recipe, work.feed(method.sees != "test").source.labels
    model, drawn = work.before().to(work.machine.device), pool(work, method)
    ids = drawn[calibration(labels[drawn], recipe.score.images, recipe.seed, recipe.score.balance)]
    if isinstance(recipe.score.images, int) and len(ids) < recipe.score.images:
        work.tracker.say(f"  score.images asks for {recipe.score.images} images; there are {len(ids)}, all are used")
    feed, ids = work.scoring(ids, method)
    if not len(ids):
        raise PruneError(
            f"score.images: none of the calibration images can be read ({next(iter(feed.skipped.values()))})"
        )
    record = Path(recipe.score.record).expanduser() if recipe.score.record else work.folder / work.here(RECORD)
    return Bench(
        model, channels, feed, ids, work.machine, work.tracker, recipe.score.micro_batch, recipe.seed, partial,
        work.identity, recipe.score.save_every,
        record=None if other else record, lineage=work.lineage, augmented=method.augmented,
    )  # fmt: skip

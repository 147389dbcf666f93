"""Accuracy and loss, exact for every number of ranks."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dist_prune.errors import PruneError
from dist_prune.runtime import stopping
from dist_prune.runtime.collectives import Ranks
from dist_prune.runtime.data.dealing import deal, micro_batches
from dist_prune.runtime.data.feed import Feed
from dist_prune.runtime.tracking import Tracker

HUGE = 2.0**18  # a larger mean loss counts as not finite; sums over millions of images stay within int64
LOSS_UNIT = 2**24  # per-image losses are added as multiples of 2**-24: integers, so the order does not matter


@torch.no_grad()
def evaluate(
    model: nn.Module,
    feed: Feed,
    batch: int,
    ranks: Ranks,
    tracker: Tracker,
    what: str = "evaluate",
    ids: np.ndarray | None = None,
) -> dict[str, float]:
    """``top1`` and ``top5`` in percent, mean cross-entropy ``loss`` (nan where a logit is), number of ``images``.

    Every image of ``ids`` (default: all) counts once. All ranks make the same number of forward passes, those that have
    run out of images with an empty picture that does not count: sharded weights (ZeRO-3) are gathered in each of them.

    ``top5`` counts a hit among the 5 highest logits (all of them where there are fewer classes).
    """
    model.eval()
    lists = micro_batches(np.arange(len(feed)) if ids is None else ids, batch)
    mine = deal(lists, ranks.rank, ranks.world)
    batches, rounds = feed.batches(mine), -(-len(lists) // ranks.world)
    seen, side = 0, feed.look.size
    counts = torch.zeros(4, dtype=torch.int64, device=feed.device)  # read once, behind the last batch
    empty = torch.zeros((1, feed.source.in_chans, side, side), dtype=feed.dtype, device=feed.device)
    for turn in tracker.bar(range(rounds), rounds, what):
        if stopping.poll(ranks)[0]:
            raise stopping.leave(f"in {what}")
        part = next(batches) if turn < len(mine) else None
        if part is None or not len(part.ids):  # none of them could be read (data.on_error: skip)
            model(empty)
            continue
        logits = model(part.images).float()
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == part.labels[:, None]
        units, odd = losses(logits, part.labels)
        counts += torch.stack([top[:, 0].sum(), top.sum(), units, odd])
        seen += len(part.ids)
    first, five, loss_units, strange, images = ranks.total(*counts.tolist(), seen)
    if not images:
        raise PruneError(f"{what}: none of the {sum(map(len, lists))} images could be read")
    return {
        "top1": 100 * first / images,
        "top5": 100 * five / images,
        "loss": mean_loss(loss_units, strange, images),
        "images": images,
    }


def losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropies of logits (n, classes), added as integers: in units of 1 / LOSS_UNIT, and how many are not finite
    (those count as 0 in the sum)."""
    loss = functional.cross_entropy(logits.double(), labels, reduction="none")
    finite = loss < HUGE
    return (torch.where(finite, loss, 0.0) * LOSS_UNIT).round().long().sum(), (~finite).sum()


def mean_loss(units: int, strange: int, images: int) -> float:
    """The mean of such sums; nan where one was not finite."""
    return float("nan") if strange else units / LOSS_UNIT / images

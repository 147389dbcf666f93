"""Accuracy and loss: integers counted per batch, so exact for every number of ranks."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.data.loader import Batch, ImageLoader
from dist_prune.data.sampling import micro_batches, shard
from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.training.tracking import Tracker

HUGE = 2.0**18  # a larger mean loss counts as not finite; sums over millions of images stay within int64
LOSS_UNIT = 2**24  # per-image losses are added as multiples of 2**-24: integers, so the order does not matter


def num_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(..., n, classes) logits and (n,) labels -> (...) int64, on their device: images whose largest logit is right."""
    return (logits.argmax(-1) == labels).sum(-1)


@torch.no_grad()
def count_images(
    count: Callable[[Batch], Tensor], length: int, loader: ImageLoader, ids: np.ndarray, batch: int, comm: Communicator,
    tracker: Tracker, what: str, idle: Callable[[], object] = lambda: None,
) -> tuple[list[int], int]:  # fmt: skip
    """Add what is counted in each batch over the batches of all ranks.

    Args:
        count: a batch -> (length,) int64 on the feed's device.
        ids: each of these images counts once; ``batch`` of them at a time.
        what: the work, for the progress bar and errors.
        idle: called for each batch that the other ranks have and this one has not (or cannot read).

    Returns:
        The sums and the number of images that could be read, the same on every rank.

    Raises:
        PruneError: no image could be read, or the run was asked to stop.
    """
    lists = micro_batches(ids, batch)
    mine = shard(lists, comm.rank, comm.world)
    batches, rounds, images = loader.batches(mine), -(-len(lists) // comm.world), 0
    sums = torch.zeros(length, dtype=torch.int64, device=loader.device)  # read once, after the last batch
    for turn in tracker.bar(range(rounds), rounds, what):
        if preemption.poll(comm)[0]:
            raise preemption.preempted_error(f"in {what}")
        part = next(batches) if turn < len(mine) else None
        if part is None or not len(part.ids):  # none of them could be read (data.on_error: skip)
            idle()
            continue
        sums += count(part)
        images += len(part.ids)
    *totals, images = comm.sum_ints(*sums.tolist(), images)
    if not images:
        raise PruneError(f"{what}: none of the {len(ids)} images could be read")
    return totals, images


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: ImageLoader,
    batch: int,
    comm: Communicator,
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
    empty = torch.zeros(
        (1, loader.source.in_chans, *[loader.transform.size] * 2), dtype=loader.dtype, device=loader.device
    )

    def count(part: Batch) -> Tensor:
        logits = model(part.images).float()
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == part.labels[:, None]
        return torch.stack([top[:, 0].sum(), top.sum(), *losses(logits, part.labels)])

    ids = np.arange(len(loader)) if ids is None else ids
    counts, images = count_images(count, 4, loader, ids, batch, comm, tracker, what, lambda: model(empty))
    first, five, loss_units, strange = counts
    return {
        "top1": 100 * first / images,
        "top5": 100 * five / images,
        "loss": mean_loss(loss_units, strange, images),
        "images": images,
    }


def losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies of logits (n, classes), added as integers: in units of 1 / LOSS_UNIT, and how many are not finite
    (those count as 0 in the sum)."""
    loss = functional.cross_entropy(logits.double(), labels, reduction="none")
    finite = loss < HUGE
    return (torch.where(finite, loss, 0.0) * LOSS_UNIT).round().long().sum(), (~finite).sum()


def mean_loss(units: int, strange: int, images: int) -> float:
    """The mean of such sums; nan where one was not finite."""
    return float("nan") if strange else units / LOSS_UNIT / images

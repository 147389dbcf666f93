"""Accuracy and loss, counted as integers: the results are exact, and the same for every number of ranks."""

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
    """The number of images whose largest logit is that of their label.

    Args:
        logits: (..., n, classes).
        labels: (n,) int64.

    Returns:
        (...) int64, on the device of ``logits``.
    """
    return (logits.argmax(-1) == labels).sum(-1)


@torch.no_grad()
def count_images(
    count: Callable[[Batch], Tensor],
    length: int,
    loader: ImageLoader,
    ids: np.ndarray,
    batch: int,
    comm: Communicator,
    tracker: Tracker,
    what: str,
    idle: Callable[[], object] = lambda: None,
) -> tuple[list[int], int]:
    """Sum integer counts over the batches of all ranks; a collective, called by every rank.

    Args:
        count: a batch -> (length,) int64 counts on the loader's device.
        length: how many counts a batch has.
        loader: the images.
        ids: (n,) the images; each counts once.
        batch: images of one batch.
        comm: all processes.
        tracker: for the progress bar.
        what: name of the work, for the progress bar and errors.
        idle: called for each batch that the other ranks have and this one has not (or cannot read).

    Returns:
        The ``length`` sums and the number of images that could be read, the same on every rank.

    Raises:
        PruneError: no image could be read.
        PreemptedError: on every rank, if one of them was asked to stop.
    """
    lists = micro_batches(ids, batch)
    own = shard(lists, comm.rank, comm.world)
    batches = loader.batches(own)
    rounds = -(-len(lists) // comm.world)
    images = 0
    sums = torch.zeros(length, dtype=torch.int64, device=loader.device)  # read once, after the last batch
    for round_number in tracker.bar(range(rounds), rounds, what):
        if preemption.poll(comm)[0]:
            raise preemption.preempted_error(f"in {what}")
        own_batch = next(batches) if round_number < len(own) else None
        if own_batch is None or not len(own_batch.ids):  # none of them could be read (data.on_error: skip)
            idle()
            continue
        sums += count(own_batch)
        images += len(own_batch.ids)
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
    """Evaluate a network on images; a collective, called by every rank.

    All ranks make the same number of forward passes, because sharded weights (ZeRO-3) are gathered in each of them. A
    rank without further images passes an empty image that does not count.

    Args:
        model: on the loader's device; left in evaluation mode.
        loader: the images, without augmentation.
        batch: images of one forward pass.
        comm: all processes.
        tracker: for the progress bar.
        what: name of the evaluation, for the progress bar and errors.
        ids: (n,) the images (default: all); each counts once.

    Returns:
        ``top1`` and ``top5`` in percent (``top5``: the label is among the 5 largest logits, or all if there are fewer
        classes), ``loss``, the mean cross-entropy (nan if a logit is not finite), and ``images``, their number. The
        same on every rank.

    Raises:
        PruneError: no image could be read.
        PreemptedError: on every rank, if one of them was asked to stop.
    """
    model.eval()
    empty = torch.zeros((1, *loader.image_shape), dtype=loader.dtype, device=loader.device)

    def count(part: Batch) -> Tensor:
        logits = model(part.images).float()
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == part.labels[:, None]
        return torch.stack([top[:, 0].sum(), top.sum(), *losses(logits, part.labels)])

    ids = np.arange(len(loader)) if ids is None else ids
    counts, images = count_images(count, 4, loader, ids, batch, comm, tracker, what, lambda: model(empty))
    top1_hits, top5_hits, loss_units, not_finite = counts
    return {
        "top1": 100 * top1_hits / images,
        "top5": 100 * top5_hits / images,
        "loss": mean_loss(loss_units, not_finite, images),
        "images": images,
    }


def losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies, added as integers.

    Args:
        logits: (n, classes).
        labels: (n,) int64.

    Returns:
        () int64 sum in units of 1 / LOSS_UNIT, in which losses that are not finite count as 0, and () int64 number of
        losses that are not finite.
    """
    loss = functional.cross_entropy(logits.double(), labels, reduction="none")
    finite = loss < HUGE
    return (torch.where(finite, loss, 0.0) * LOSS_UNIT).round().long().sum(), (~finite).sum()


def mean_loss(units: int, not_finite: int, images: int) -> float:
    """The mean loss from the sums of ``losses``.

    Args:
        units: sum in units of 1 / LOSS_UNIT.
        not_finite: number of losses that are not finite.
        images: number of images.

    Returns:
        The mean; nan if ``not_finite`` is not 0.
    """
    return float("nan") if not_finite else units / LOSS_UNIT / images

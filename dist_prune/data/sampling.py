"""Samplers: which rank sees which image, and when.

They compute with sample ids alone, so every loader and every number of ranks gives the same order of images.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dist_prune.errors import PruneError

T = TypeVar("T")


def micro_batches(ids: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut sample ids into micro-batches. The partition does not depend on the number of ranks.

    Args:
        ids: (n,) int64 sample ids.
        size: images of a micro-batch.

    Returns:
        Views of ``ids`` of ``size`` ids each, in order; the last one may be shorter.
    """
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def shard(items: Sequence[T], rank: int, world: int) -> list[T]:
    """Shard items over ranks: item i goes to rank i modulo ``world``.

    Args:
        items: the same list on every rank, for example micro-batches.
        rank: number of this rank, from 0.
        world: number of ranks.

    Returns:
        The items of this rank. Over all ranks each item occurs once; nothing is padded or repeated.
    """
    return list(items[rank::world])


def calibration_ids(labels: np.ndarray, images: int | str, seed: int, balance: str = "uniform") -> np.ndarray:
    """Draw the calibration images.

    Args:
        labels: (n,) int64 class numbers of all images.
        images: how many to draw, or ``all``.
        seed: decides the draw.
        balance: ``uniform`` draws from all images alike. ``class`` takes the same number of each class. If the number
            does not divide, some drawn classes give one more. A class with too few images gives all of them, and the
            other classes give more.

    Returns:
        (k,) int64 sample ids, ascending; all ids if ``images`` is ``all`` or at least n.
    """
    if images == "all" or int(images) >= len(labels):
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    if balance == "uniform":
        return np.sort(order[: int(images)])
    classes = np.unique(labels)
    occurrence = np.empty(len(labels), dtype=np.int64)  # images of the same class that come earlier in the drawn order
    drawn_labels = labels[order]
    for label in classes:
        positions = np.flatnonzero(drawn_labels == label)
        occurrence[positions] = np.arange(len(positions))
    class_draw = rng.permutation(len(classes))[
        np.searchsorted(classes, drawn_labels)
    ]  # order of the classes among images of equal occurrence
    return np.sort(order[np.lexsort((class_draw, occurrence))[: int(images)]])


def holdout_split(ids: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split sample ids at random into training images and a holdout set.

    Args:
        ids: (n,) int64 sample ids.
        share: fraction of ``ids`` to hold out. Above 0, at least one of two or more is held out,
            and at least one is left to train on.
        seed: decides the split.

    Returns:
        (training ids, held-out ids), both int64 and ascending.
    """
    count = min(max(1, round(share * len(ids))), len(ids) - 1) if share > 0 else 0
    order = np.random.default_rng([seed, 0x401D]).permutation(len(ids))
    return np.sort(ids[order[count:]]), np.sort(ids[order[:count]])


def epoch_batches(
    count: int, batch: int, seed: int, epoch: int, rank: int, world: int
) -> Iterator[tuple[np.ndarray, int]]:
    """The batches of one training epoch, each image once, in an order drawn from (seed, epoch).

    Global batches are the same for every number of ranks. If ``batch`` does not divide ``count``, a rest of less than
    half a batch joins the last batch, and a longer rest is a batch of its own.

    Args:
        count: number of training images; their ids are 0 to count - 1.
        batch: images of a global batch, over all ranks.
        seed: the recipe's seed.
        epoch: from 0.
        rank: number of this rank, from 0.
        world: number of ranks.

    Yields:
        (the ids of this rank (k,) int64, the number of images of the global batch).
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    last = steps_per_epoch(count, batch) - 1
    for step in range(last + 1):
        global_batch = order[step * batch :] if step == last else order[step * batch : (step + 1) * batch]
        yield np.array_split(global_batch, world)[rank], len(global_batch)


def steps_per_epoch(count: int, batch: int) -> int:
    """Number of training steps in one epoch, at least 1.

    Args:
        count: number of training images.
        batch: images of a global batch.
    """
    full, rest = divmod(count, batch)
    return max(1, full + int(2 * rest >= batch))


def smallest_batch(count: int, batch: int) -> int:
    """Number of images of the smallest global batch of an epoch.

    Args:
        count: number of training images.
        batch: images of a global batch.
    """
    last = count - (steps_per_epoch(count, batch) - 1) * batch
    return last if last == count else min(batch, last)


def check_batch_size(batch: int, images: int, world: int, name: str) -> None:
    """Refuse batches that leave a rank fewer than two images: a batch norm cannot train on one.

    Args:
        batch: images of a global batch.
        images: number of training images.
        world: number of ranks.
        name: section of the recipe, for the message.

    Raises:
        PruneError: some global batch has fewer than 2 * ``world`` images.
    """
    smallest = smallest_batch(images, batch)
    if smallest < 2 * world:
        raise PruneError(
            f"{name}.batch: {batch} (of {images} images) is too small for {world} process(es): batch norms need at "
            f"least 2 images each, so every global batch at least {2 * world}; the smallest would be {smallest}. A "
            f"batch of {4 * world} or more never leaves too few at the end of an epoch."
        )


def accumulation_steps(images: int, accumulate: int, world: int) -> int:
    """Number of gradient accumulation steps for a global batch, the same on every rank.

    Every step is a forward and backward pass in which all ranks take part, so the number must not depend on a rank's
    own share.

    Args:
        images: images of the global batch.
        accumulate: upper limit.
        world: number of ranks.

    Returns:
        At least 1, at most ``accumulate``; each step has two images or more on each rank if the batch allows it.
    """
    return max(1, min(accumulate, images // world // 2))


def uniform_from_ids(seed: int, epoch: int, ids: np.ndarray, columns: int, stream: int = 0) -> Tensor:
    """Random numbers for each sample, uniform in [0, 1).

    A number depends on (seed, epoch, sample id, column, stream) alone. Ranks and the order of the samples do not
    change it.

    Args:
        seed: the recipe's seed.
        epoch: from 0.
        ids: (n,) int64 sample ids.
        columns: how many numbers each sample gets.
        stream: uses that must not share numbers take different streams.

    Returns:
        (n, columns) float64 on the CPU.
    """
    start = seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 + stream * 0x8CB92BA72F3D8DD7 + 1
    key = np.uint64(start % 2**64)
    cells = ids.astype(np.uint64)[:, None] * np.uint64(columns) + np.arange(columns, dtype=np.uint64)[None]
    with np.errstate(over="ignore"):
        x = cells * np.uint64(0xBF58476D1CE4E5B9) + key
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)

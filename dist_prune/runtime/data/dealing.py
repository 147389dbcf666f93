"""Who sees which image when. Pure arithmetic on sample ids: the same for every loader and number of ranks."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dist_prune.errors import PruneError

T = TypeVar("T")


def micro_batches(ids: np.ndarray, size: int) -> list[np.ndarray]:
    """The fixed partition of ``ids`` (n,) into micro-batches; the last one may be shorter."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def deal(items: Sequence[T], rank: int, world: int) -> list[T]:
    """This rank's share: every item once over all ranks, no padding."""
    return list(items[rank::world])


def calibration(labels: np.ndarray, images: int | str, seed: int, balance: str = "uniform") -> np.ndarray:
    """Ids of the calibration images, ascending: all, or ``images`` of them drawn by ``seed``.

    Args:
        labels: (n,) of all images.
        images: how many, or ``all``.
        balance: ``uniform`` draws from all images alike; ``class`` takes the same number of each class (one more of
            some, drawn as well, where it does not divide; a class that has too few gives what it has, and the others
            fill up).
    """
    if images == "all" or int(images) >= len(labels):
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    if balance == "uniform":
        return np.sort(order[: int(images)])
    classes = np.unique(labels)
    turn = np.empty(len(labels), dtype=np.int64)  # how many of its class come before an image in the drawn order
    drawn = labels[order]
    for label in classes:
        places = np.flatnonzero(drawn == label)
        turn[places] = np.arange(len(places))
    lot = rng.permutation(len(classes))[np.searchsorted(classes, drawn)]  # which class comes first within a turn
    return np.sort(order[np.lexsort((lot, turn))[: int(images)]])


def held_out(ids: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training ids, held-out ids), both ascending; ``share`` of ``ids`` (at least one) is held out by ``seed``."""
    count = min(max(1, round(share * len(ids))), len(ids) - 1) if share > 0 else 0
    order = np.random.default_rng([seed, 0x401D]).permutation(len(ids))
    return np.sort(ids[order[count:]]), np.sort(ids[order[:count]])


def epoch(count: int, batch: int, seed: int, number: int, rank: int, world: int) -> Iterator[tuple[np.ndarray, int]]:
    """One training epoch: (this rank's ids, size of the whole batch over all ranks), in an order from (seed, epoch).

    Every image once. The whole batches are the same for every number of ranks: a ragged end of less than half a batch
    joins the batch before it, a longer one is a batch of its own.
    """
    order = np.random.default_rng([seed, number]).permutation(count)
    last = steps(count, batch) - 1
    for step in range(last + 1):
        whole = order[step * batch :] if step == last else order[step * batch : (step + 1) * batch]
        yield np.array_split(whole, world)[rank], len(whole)


def steps(count: int, batch: int) -> int:
    """Training steps of one epoch."""
    full, rest = divmod(count, batch)
    return max(1, full + int(2 * rest >= batch))


def smallest_batch(count: int, batch: int) -> int:
    """Images of the smallest whole batch of an epoch."""
    last = count - (steps(count, batch) - 1) * batch
    return last if last == count else min(batch, last)


def check(batch: int, images: int, world: int, name: str) -> None:
    """PruneError where a process would get fewer than two images of some batch: batch norms cannot train on one."""
    smallest = smallest_batch(images, batch)
    if smallest < 2 * world:
        raise PruneError(
            f"{name}.batch: {batch} (of {images} images) is too small for {world} process(es): batch norms need at "
            f"least 2 images each, so every global batch at least {2 * world}; the smallest would be {smallest}. A "
            f"batch of {4 * world} or more never leaves too few at the end of an epoch."
        )


def pieces(whole: int, accumulate: int, world: int) -> int:
    """Into how many pieces each rank cuts its share of a whole batch: at most ``accumulate``, two images in each.

    The same number on every rank, whatever its share: each piece is a pass in which wrappers meet the other ranks.
    """
    return max(1, min(accumulate, whole // world // 2))


def draws(seed: int, number: int, ids: np.ndarray, columns: int, stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) of shape (len(ids), columns), float64.

    Each comes from (seed, epoch, sample id, column, stream) alone; purposes that must not share numbers take different
    streams.
    """
    start = seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + stream * 0x8CB92BA72F3D8DD7 + 1
    key = np.uint64(start % 2**64)
    cells = ids.astype(np.uint64)[:, None] * np.uint64(columns) + np.arange(columns, dtype=np.uint64)[None]
    with np.errstate(over="ignore"):
        x = cells * np.uint64(0xBF58476D1CE4E5B9) + key
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)

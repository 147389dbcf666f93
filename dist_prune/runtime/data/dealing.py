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


def calibration(count: int, images: int | str, seed: int) -> np.ndarray:
    """Ids of the calibration images, ascending: all of ``count``, or ``images`` of them drawn by ``seed``."""
    if images == "all" or int(images) >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[: int(images)])


def calibration_per_class(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Ids of the calibration images, ascending: ``per_class`` of every class, drawn by ``seed`` without replacement.

    Raises:
        PruneError: where a class has fewer.
    """
    found, rng = [], np.random.default_rng(seed)
    for label in np.unique(labels):
        ids = np.flatnonzero(labels == label)
        if len(ids) < per_class:
            raise PruneError(f"score.per_class: {per_class}, but class {label} has only {len(ids)} training images")
        found.append(rng.permutation(ids)[:per_class])
    return np.sort(np.concatenate(found))


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


def draws(seed: int, number: int, ids: np.ndarray, columns: int) -> Tensor:
    """Uniform numbers in [0, 1) of shape (len(ids), columns), each from (seed, epoch, sample id, column) alone."""
    key = np.uint64((seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 1) % 2**64)
    cells = ids.astype(np.uint64)[:, None] * np.uint64(columns) + np.arange(columns, dtype=np.uint64)[None]
    with np.errstate(over="ignore"):
        x = cells * np.uint64(0xBF58476D1CE4E5B9) + key
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)

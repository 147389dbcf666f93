"""What the parts share: clocks that wait for the device, limits of time, synthetic images on the device."""

import contextlib
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from dist_prune.data.datasets import ArraySource

Row = dict[str, Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class OutOfTimeError(Exception):
    """A measurement took longer than its share."""


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """OutOfTimeError inside, after so many seconds."""

    def ring(*_: Any) -> None:
        raise OutOfTimeError(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def within(rows: Iterable[Row], what: str, seconds: float) -> Iterator[Row]:
    """The rows that come within a time. What goes wrong is a row as well, and the last one: others are worth measuring.

    The alarm is off while a row is with the caller.
    """
    left, source = time.monotonic() + seconds, iter(rows)
    while True:
        try:
            with limit(left - time.monotonic()):
                row = next(source, None)
        except OutOfTimeError:
            row = {"what": what, "failed": f"more than {seconds:.0f} s"}
        except Exception as error:
            row = {"what": what, "failed": f"{type(error).__name__}: {error}"[:300]}
        if row is not None:
            yield row
        if row is None or "failed" in row:
            return


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(act: Callable[[], Any], device: torch.device) -> float:
    """Wall time of ``act``, the device's work included."""
    wait(device)
    start = time.perf_counter()
    act()
    wait(device)
    return time.perf_counter() - start


def in_turns(
    acts: dict[str, Callable[[], Any]], turns: int, device: torch.device, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of each act, taking turns, after one turn that does not count (``warm``: it was there before)."""
    times: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(turns + 1 - warm):
        for name, act in acts.items():
            seconds = seconds_of(act, device)
            if turn or warm:
                times[name].append(seconds)
    return times


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """Median of the ratios of neighbours, one / other."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def peak_mb(device: torch.device) -> int | None:
    """The most memory that tensors took since the last call; None where nobody counts it."""
    if device.type != "cuda":
        return None
    peak = round(torch.cuda.max_memory_allocated(device) / 2**20)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def synthetic(images: int, size: int, classes: int = 1000, seed: int = 0) -> ArraySource:
    """Smooth random images, uint8 (n, size, size, 3): noise in blocks of 8 pixels, so that maps differ in space."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (images, -(-size // 8), -(-size // 8), 3), dtype=np.uint8)
    pixels = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :size, :size]
    labels = np.arange(images, dtype=np.int64) % classes
    return ArraySource(np.ascontiguousarray(pixels), labels, tuple(map(str, range(classes))))

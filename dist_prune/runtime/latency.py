"""Measured time, not counted operations: several networks interleaved in one run."""

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_prune.errors import PruneError

WARMUP = 3
LARGEST_BATCH = 65536
ROOM = 0.8  # share of the memory that one layer's input and output may take


@torch.no_grad()
def latency(
    models: Mapping[str, nn.Module],
    shape: tuple[int, ...],
    batches: Sequence[int],
    repeats: int,
    device: torch.device,
    threads: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Median time of a forward pass.

    Args:
        models: name -> network; they take turns, so that a machine that speeds up or slows down does so for all.
        shape: (C, H, W) of an image.
        batches: batch sizes.
        repeats: timed passes of each network at each batch size, after a warm-up.
        threads: CPU threads while timing (the setting is given back).

    Returns:
        name -> batch -> ``ms`` (median), ``images_per_s``, ``device``, ``threads``, ``repeats``.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    out: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in models}
    try:
        for model in models.values():
            model.to(device).eval()
        for batch in batches:
            x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
            times: dict[str, list[float]] = {name: [] for name in models}
            for turn in range(WARMUP + repeats):
                for name, model in models.items():
                    seconds = _once(model, x, device)
                    if turn >= WARMUP:
                        times[name].append(seconds)
            for name in models:
                median = statistics.median(times[name])
                out[name][str(batch)] = {
                    "ms": 1000 * median, "ms_best": 1000 * min(times[name]), "images_per_s": batch / median,
                    "device": str(device), "threads": threads, "repeats": repeats,
                }  # fmt: skip
    finally:
        torch.set_num_threads(before)
    return out


@torch.no_grad()
def check(
    model: nn.Module, shape: tuple[int, ...], batches: Sequence[int], threads: int | None, device: torch.device
) -> None:
    """What can be said before any hour is spent; ``model`` gets one image of zeros.

    Raises:
        PruneError: more threads than the machine has cores, or a batch whose largest layer is larger than the memory.
    """
    here = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= here:
        raise PruneError(f"report.threads: {threads} threads; this machine has {here} cores. Name 1 to {here}")
    odd = [batch for batch in batches if not 1 <= batch <= LARGEST_BATCH]
    if odd:
        raise PruneError(f"report.latency_batches: {odd[0]} is no batch size; name 1 to {LARGEST_BATCH:,}")
    largest = 0

    def note(_: nn.Module, given: Any, out: Any) -> None:
        nonlocal largest
        found = [part for part in (*given, out) if isinstance(part, torch.Tensor)]
        largest = max(largest, sum(part.numel() * part.element_size() for part in found))

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        model.eval()(torch.zeros(1, *shape))
    finally:
        for hook in hooks:
            hook.remove()
    have = (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    wide = [batch for batch in batches if batch * largest > ROOM * have]
    if wide:
        most = int(ROOM * have // largest)
        raise PruneError(
            f"report.latency_batches: of {wide[0]:,} images one layer alone needs {wide[0] * largest / 2**30:,.1f} "
            f"GiB, and {device} has {have / 2**30:,.1f}; at most {most:,} images"
        )


def _once(model: nn.Module, x: torch.Tensor, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    model(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start

"""Measured time, not counted operations: several networks interleaved in one run."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

WARMUP = 3


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


def _once(model: nn.Module, x: torch.Tensor, device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    model(x)
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until the device has done what it was given: without that, what is timed is the giving."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize()

"""Latency of several networks, measured in turns, and measured again if other programs disturbed it."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_prune.errors import PruneError
from dist_prune.training.timing_noise import timing_doubts
from dist_prune.training.tracking import Tracker

WARMUP = 3
LARGEST_BATCH = 65536
MEMORY_SHARE = 0.8  # largest share of the memory for one layer's input and output
SHORT_S = 0.05  # seconds; a shorter pass depends on the caches that the network before it has filled
ROUNDS = 3  # largest number of repetitions of all timed passes on a busy machine
Timer = Callable[[nn.Module, torch.Tensor, torch.device], float]


@torch.no_grad()
def measure_latency(
    models: Mapping[str, nn.Module],
    shape: tuple[int, ...],
    batches: Sequence[int],
    repeats: int,
    device: torch.device,
    threads: int,
    timer: Timer | None = None,
    rounds: int = ROUNDS,
    tracker: Tracker | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure the median time of a forward pass of each network; one rank calls it, it is no collective.

    If times are not reliable (see ``timing_noise.timing_doubts``) all are measured again; the round with the fewest
    doubts counts.

    Args:
        models: name -> network, moved to the device and set to evaluation mode. They are timed in turns, so that a
            machine that becomes faster or slower does so for all.
        shape: (C, H, W) of an image.
        batches: batch sizes.
        repeats: number of timed passes of each network at each batch size, after a warm-up.
        device: device of the passes.
        threads: CPU threads during the timing; the former number is restored.
        timer: (network, batch, device) -> seconds of one pass (default: the real clock).
        rounds: largest number of rounds.
        tracker: for the progress, between two batch sizes and never within a measurement; None: none.

    Returns:
        Name -> batch size as a string -> ``ms`` (median, milliseconds), ``ms_best`` (fastest pass), ``images_per_s``,
        ``device``, ``threads``, ``repeats``, ``rounds`` (number of rounds), ``reliable``, and ``why`` if it is not.
    """
    timer, before = timer or _time_pass, torch.get_num_threads()
    torch.set_num_threads(threads)
    out: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in models}
    try:
        for model in models.values():
            model.to(device).eval()
        _warm_allocator()
        twins = _twins(models)
        for batch in (tracker or Tracker(False)).bar(batches, len(batches), "measure times"):
            x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
            best = dict.fromkeys(models, float("inf"))
            measured: list[tuple[dict[str, str], float, dict[str, float]]] = []
            while len(measured) < rounds and not (measured and not measured[-1][0]):
                times = _time_in_turns(models, x, repeats, device, timer)
                best = {name: min(best[name], *times[name]) for name in models}
                medians = {name: statistics.median(times[name]) for name in models}
                measured.append(
                    (timing_doubts(medians, best, twins), max(medians[n] / best[n] for n in models), medians)
                )
            _, _, medians = min(measured, key=lambda one: (len(one[0]), one[1]))
            reasons = timing_doubts(medians, best, twins)
            for name in models:
                out[name][str(batch)] = {
                    "ms": 1000 * medians[name], "ms_best": 1000 * best[name], "images_per_s": batch / medians[name],
                    "device": str(device), "threads": threads, "repeats": repeats, "rounds": len(measured),
                    "reliable": name not in reasons, **({"why": reasons[name]} if name in reasons else {}),
                }  # fmt: skip
    finally:
        torch.set_num_threads(before)
    return out


@torch.no_grad()
def check(
    model: nn.Module, shape: tuple[int, ...], batches: Sequence[int], threads: int | None, device: torch.device
) -> None:
    """Check the settings of a later timing by one image of zeros.

    Args:
        model: on the CPU; left in evaluation mode.
        shape: (C, H, W) of an image.
        batches: batch sizes.
        threads: CPU threads, or None for the default.
        device: device of the timing.

    Raises:
        PruneError: more threads than the machine has cores, an impossible batch size, or a batch whose largest layer
            does not fit into the memory.
    """
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= cores:
        raise PruneError(f"report.threads: {threads} threads; this machine has {cores} cores. Name 1 to {cores}")
    impossible = [batch for batch in batches if not 1 <= batch <= LARGEST_BATCH]
    if impossible:
        raise PruneError(f"report.latency_batches: {impossible[0]} is no batch size; name 1 to {LARGEST_BATCH:,}")
    largest = 0

    def note(_: nn.Module, given: Any, out: Any) -> None:
        nonlocal largest
        found = [part for part in (*given, out) if isinstance(part, torch.Tensor)]
        largest = max(largest, sum(part.nbytes for part in found))

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        model.eval()(torch.zeros(1, *shape))
    finally:
        for hook in hooks:
            hook.remove()
    memory = (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    too_large = [batch for batch in batches if batch * largest > MEMORY_SHARE * memory]
    if too_large:
        most = int(MEMORY_SHARE * memory // largest)
        raise PruneError(
            f"report.latency_batches: of {too_large[0]:,} images one layer alone needs "
            f"{too_large[0] * largest / 2**30:,.1f} GiB, "
            f"and {device} has {memory / 2**30:,.1f}; at most {most:,} images"
        )


def _warm_allocator() -> None:
    """Let the C library keep memory between passes, as it does in any process that has run for a while.

    glibc gives a block back to the system, and faults it in again page by page at the next pass, until a large one was
    freed once (its thresholds follow the largest block freed, up to 32 MiB). A dense network was a third slower before
    that than after it; a pruned one, whose blocks are smaller, was not.
    """
    block = torch.ones(31 * 2**18)
    del block


def _time_in_turns(
    models: Mapping[str, nn.Module], x: torch.Tensor, repeats: int, device: torch.device, timer: Timer
) -> dict[str, list[float]]:
    """Name -> seconds of each pass after the warm-up.

    A network with short passes runs once untimed before each of them. Otherwise its time depends on the network before
    it (the times of two equal networks, one of them after a large one, differed by 15 %).
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    short = dict.fromkeys(models, False)
    for turn in range(WARMUP + repeats):
        for name, model in models.items():
            if turn >= WARMUP and short[name]:
                timer(model, x, device)
            seconds = timer(model, x, device)
            if turn >= WARMUP:
                times[name].append(seconds)
            else:
                short[name] |= seconds < SHORT_S
    return times


def _twins(models: Mapping[str, nn.Module]) -> list[list[str]]:
    """Names of networks of one architecture: the same layers, the same shapes in the same memory order."""
    groups: dict[Any, list[str]] = {}
    for name, model in models.items():
        layers = tuple((key, type(module)) for key, module in model.named_modules())
        tensors = tuple((key, tuple(t.shape), t.stride()) for key, t in model.state_dict().items())
        groups.setdefault((layers, tensors), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _time_pass(model: nn.Module, x: torch.Tensor, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    model(x)
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work; without that, only the launch of the work would be timed.

    Args:
        device: of any type; nothing is waited for on a CPU.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize()

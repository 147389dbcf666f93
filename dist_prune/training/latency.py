"""Measured time, not counted operations: several networks interleaved, again where other work disturbed them."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_prune.errors import PruneError
from dist_prune.training.timing_noise import timing_doubts

WARMUP = 3
LARGEST_BATCH = 65536
ROOM = 0.8  # share of the memory that one layer's input and output may take
SHORT_S = 0.05  # a pass so short feels the caches that the network before it left behind
ROUNDS = 3  # of all timed passes, at most: a busy machine may have calmed down
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
) -> dict[str, dict[str, dict[str, Any]]]:
    """Median time of a forward pass.

    Times that are not reliable (see ``spread.doubts``) are measured again; the round with the fewest doubts counts.

    Args:
        models: name -> network; they take turns, so that a machine that speeds up or slows down does so for all.
        shape: (C, H, W) of an image.
        batches: batch sizes.
        repeats: timed passes of each network at each batch size, after a warm-up.
        threads: CPU threads while timing (the setting is given back).
        timer: seconds of one pass of a network (default: the real clock).
        rounds: how often all is timed, at most.

    Returns:
        name -> batch -> ``ms`` (median), ``ms_best``, ``images_per_s``, ``device``, ``threads``, ``repeats``,
        ``rounds`` (how often all was timed), ``reliable``, and ``why`` where it is not.
    """
    timer, before = timer or _once, torch.get_num_threads()
    torch.set_num_threads(threads)
    out: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in models}
    try:
        for model in models.values():
            model.to(device).eval()
        _settle()
        twins = _twins(models)
        for batch in batches:
            x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
            best = dict.fromkeys(models, float("inf"))
            found: list[tuple[dict[str, str], float, dict[str, float]]] = []
            while len(found) < rounds and not (found and not found[-1][0]):
                times = _turns(models, x, repeats, device, timer)
                best = {name: min(best[name], *times[name]) for name in models}
                medians = {name: statistics.median(times[name]) for name in models}
                found.append((timing_doubts(medians, best, twins), max(medians[n] / best[n] for n in models), medians))
            _, _, medians = min(found, key=lambda one: (len(one[0]), one[1]))
            why = timing_doubts(medians, best, twins)
            for name in models:
                out[name][str(batch)] = {
                    "ms": 1000 * medians[name], "ms_best": 1000 * best[name], "images_per_s": batch / medians[name],
                    "device": str(device), "threads": threads, "repeats": repeats, "rounds": len(found),
                    "reliable": name not in why, **({"why": why[name]} if name in why else {}),
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
        largest = max(largest, sum(part.nbytes for part in found))

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


def _settle() -> None:
    """Let the C library keep memory between passes, as it does in any process that has worked for a while.

    glibc gives a block back to the system, and faults it in again page by page at the next pass, until a large one was
    freed once (its thresholds follow the largest block freed, up to 32 MiB). A dense network was a third slower before
    than behind, a pruned one, whose blocks are smaller, was not.
    """
    block = torch.ones(31 * 2**18)
    del block


def _turns(
    models: Mapping[str, nn.Module], x: torch.Tensor, repeats: int, device: torch.device, timer: Timer
) -> dict[str, list[float]]:
    """Name -> seconds of each pass behind the warm-up.

    A network whose passes are short runs once untimed before each: otherwise its time depends on who came before it
    (two equal networks, one of them behind a large one, were 15 % apart).
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


def _once(model: nn.Module, x: torch.Tensor, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    model(x)
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Until the device has done what it was given: without that, what is timed is the giving."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize()

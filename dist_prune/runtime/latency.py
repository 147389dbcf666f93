"""Measured time, not counted operations: several networks interleaved, again where other work disturbed them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_prune.runtime.spread import doubts

WARMUP = 3
SHORT_S = 0.05  # a pass so short feels the caches that the network before it left behind
ROUNDS = 3  # of all timed passes, at most: a busy machine may have calmed down
Timer = Callable[[nn.Module, torch.Tensor, torch.device], float]


@torch.no_grad()
def latency(
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
                found.append((doubts(medians, best, twins), max(medians[n] / best[n] for n in models), medians))
            _, _, medians = min(found, key=lambda one: (len(one[0]), one[1]))
            why = doubts(medians, best, twins)
            for name in models:
                out[name][str(batch)] = {
                    "ms": 1000 * medians[name], "ms_best": 1000 * best[name], "images_per_s": batch / medians[name],
                    "device": str(device), "threads": threads, "repeats": repeats, "rounds": len(found),
                    "reliable": name not in why, **({"why": why[name]} if name in why else {}),
                }  # fmt: skip
    finally:
        torch.set_num_threads(before)
    return out


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
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    model(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start

"""``dist-prune latency``: measured time of a bundle's network, dense and pruned."""

import argparse
from typing import TYPE_CHECKING, Any

from dist_prune.cli.verb import Answer, check_range
from dist_prune.errors import PruneError, shown

if TYPE_CHECKING:  # --help does without torch
    import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("bundle", help="a run directory, its export folder, or owner/name on the hub")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8, 64], help="batch sizes to time (default: 1 8 64)"
    )
    parser.add_argument(
        "--repeats", type=int, default=20, help="timed passes of each network at each batch size (default: 20)"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="number of CPU threads (default: all that this process may use)"
    )
    parser.add_argument("--device", help="device of PyTorch (default: a GPU if there is one)")
    parser.add_argument(
        "--fold", action="store_true", help="fold the batch norms of both networks first, as for deployment"
    )


def run(arguments: argparse.Namespace) -> Answer:
    """Time both networks at each batch size.

    Raises:
        PruneError: if the bundle cannot be read, the device is not here, or a number is out of range or too large for
            the memory.
    """
    import torch

    from dist_prune.distributed.cpu_count import threads as usable_threads
    from dist_prune.export import bundle
    from dist_prune.training.latency import check, measure_latency
    from dist_prune.training.timing_noise import speedup_text

    device = find_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    read = bundle.read_bundle(arguments.bundle)
    models = {"dense": read.dense(), "pruned": read.small()}
    if arguments.fold:
        models = {name: bundle.fuse(model, read.shape) for name, model in models.items()}
    check_range("--repeats", arguments.repeats, 10**6)
    check(read.small(), read.shape, arguments.batches, arguments.threads or None, device)
    threads = arguments.threads or usable_threads()
    times = measure_latency(models, read.shape, arguments.batches, arguments.repeats, device, threads)
    form = ", batch norms folded" if arguments.fold else ""
    name = read.body["backbone"]["name"]
    lines = [
        f"{name} on {device}, {threads} threads, medians of {arguments.repeats}{form}",
        "",
        "| batch | dense ms | pruned ms | dense images/s | pruned images/s | speed-up |",
        "|---|---|---|---|---|---|",
    ]
    batches = list(map(str, arguments.batches))
    for batch in batches:
        dense, pruned = times["dense"][batch], times["pruned"][batch]
        lines.append(
            f"| {batch} | {dense['ms']:.2f} | {pruned['ms']:.2f} | {dense['images_per_s']:.1f} | "
            f"{pruned['images_per_s']:.1f} | {speedup_text(dense, pruned)} |"
        )
    return "\n".join([*lines, *_doubts(times, batches)]), times, 0


def find_device(name: str) -> "torch.device":
    """The device of a name, after a trial allocation on it.

    Args:
        name: as PyTorch writes it: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

    Raises:
        PruneError: PyTorch knows no such device, or this machine has none.
    """
    import torch

    gpus = torch.cuda.device_count()
    here = ["cpu", *(f"cuda:{number}" for number in range(gpus))]
    problem = f"--device: {shown(name)} cannot be used here; PyTorch has {', '.join(here)} on this machine"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the class depends on the kind of device
        raise PruneError(problem) from error
    return device


def _doubts(times: dict[str, Any], batches: list[str]) -> list[str]:
    """A line for each time that is not reliable."""
    return [
        f"batch {batch}, {name}: {of[batch]['why']} (timed {of[batch]['rounds']} times over)"
        for batch in batches
        for name, of in times.items()
        if not of[batch]["reliable"]
    ]

"""Backward elimination alone: complete orders of one layer, no network around it.

    python benchmarks/entropy.py [--channels 512] [--batches 5] [--threads 2] [--alpha 2 1.01] [--json FILE]

Activations are ReLUs of mixtures of K / 8 smooth maps and noise; n = 100 images a batch, 4x4 maps, width by
entropy_target. The exhaustive number of spectra is arithmetic: one per candidate, step and batch, and one for the
joint. tests/pruning/information/test_backward_elimination.py shows that it gives the same order. Peak memory is that of
a process with torch and the elimination, nothing else of the harness; give one --alpha for the peak of one order.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_prune.pruning.information.backward_elimination import Elimination, EliminationState
from dist_prune.pruning.information.group_samples import EstimatorConfig, GroupSamples

N, SIDE = 100, 4


def activations(channels: int, images: int, seed: int = 0) -> Tensor:
    """(images, K, 16) float32."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(images, channels // 8, SIDE**2, generator=generator)
    weights = torch.randn(channels, channels // 8, generator=generator) * (8 / channels) ** 0.5
    noise = 0.3 * torch.randn(images, channels, SIDE**2, generator=generator)
    return torch.relu(torch.einsum("nfd,kf->nkd", basis, weights) + noise)


def exhaustive(channels: int, batches: int) -> int:
    """Spectra of an elimination that evaluates every candidate of every step, with its joints and single filters."""
    return batches * (sum(range(2, channels + 1)) + channels + channels)


def order(channels: int, batches: int, alpha: float, criterion: str) -> dict[str, Any]:
    """Seconds, spectra and peak memory of one complete order."""
    x = activations(channels, N * batches)
    parts = [torch.arange(t * N, (t + 1) * N) for t in range(batches)]
    subject = GroupSamples(
        "layer", [x], torch.zeros(len(x), dtype=torch.long), parts, EstimatorConfig(criterion, alpha=alpha)
    )  # type: ignore[arg-type]
    start, busy = time.perf_counter(), time.process_time()
    panel = subject.estimator_bank([subject.batch_bandwidths(0, 0)])
    widths = time.perf_counter() - start
    alone, course = panel.sum_over_batches("alone", range(channels)).sum(0), EliminationState(channels)
    while not course.done:
        course = Elimination(exhaustive=alpha == 2).advance(panel, alone, course)
    seconds = time.perf_counter() - start
    every = exhaustive(channels, batches)
    return {
        "alpha": alpha, "criterion": criterion, "seconds": seconds, "cpu_s": time.process_time() - busy,
        "widths_s": widths, "spectra": panel.spectra_solved,
        "exhaustive_spectra": every, "share": panel.spectra_solved / every, "first": course.order[:5],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alpha", type=float, nargs="+", default=[2.0, 1.01])
    parser.add_argument("--criterion", default="mi_rest")
    parser.add_argument("--json", type=Path, help="write the same figures here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    body: dict[str, Any] = {
        "threads": given.threads, "channels": given.channels, "batches": given.batches, "orders": [],
    }  # fmt: skip
    print(
        "| alpha | seconds | CPU seconds | spectra | exhaustive | share | peak MiB |",
        "|---|---|---|---|---|---|---|",
        sep="\n",
    )
    for alpha in given.alpha:
        row = order(given.channels, given.batches, alpha, given.criterion)
        body["orders"].append(row)
        print(
            f"| {alpha:g} | {row['seconds']:.1f} | {row['cpu_s']:.1f} | {row['spectra']:,} | "
            f"{row['exhaustive_spectra']:,} | {row['share']:.3f} | {row['peak_mib']:.0f} |",
            flush=True,
        )
    # imported after the peaks were read: timm and accelerate are larger than what is measured
    from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
    from dist_prune.pipeline.git import commit_of

    body |= {
        "machine": describe_environment(DistributedEnvironment.single_process()),
        "commit": commit_of(Path(__file__)),
    }
    if given.json:
        given.json.write_text(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()

"""What scoring costs: against the bare forward pass, over processes, in memory, and the similarity stage alone.

    python benchmarks/scoring.py [--images 2000] [--pairs 7] [--json FILE]

Real CIFAR-10 and the pretrained ResNet-56 where DIST_PRUNE_DATA has them (else the run says what it took instead).
Every comparison is interleaved in one run; quoted are medians and the median of pairwise ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import psutil
import torch

from dist_prune import methods, models
from dist_prune.data.datasets import ArraySource, open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.sampling import micro_batches, shard
from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import shutdown
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.methods.graph.method import HashAgreement
from dist_prune.pruning.graph.groups import HookPoint
from dist_prune.pruning.hooks.statistics import Accumulator
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training.tracking import Tracker

MICRO = 50


def bench_of(images: int, machine: DistributedEnvironment) -> tuple[DistributedScoringContext, str]:
    """ResNet-56 on CIFAR-10 and what it was made of."""
    torch.manual_seed(0)
    model = models.create("resnet56_cifar", 10, 3).eval()
    place = Path(os.environ.get("DIST_PRUNE_DATA", "/nowhere"))
    if (place / "cifar10.npz").is_file():
        tensor_files.load_strictly(
            model, tensor_files.read_weights(place / "weights/resnet56_cifar10.safetensors"), "the weights"
        )
        source, what = open_source("npz", str(place / "cifar10.npz"), "", True), "real CIFAR-10, pretrained weights"
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
        source, what = (
            ArraySource(pixels, np.zeros(images, np.int64), ("none",)),
            "NOISE, random weights (no data here)",
        )
    feed = ImageLoader(source, TransformConfig(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), machine.device)
    channels = trace_groups(model, torch.randn(1, 3, 32, 32))
    return DistributedScoringContext(
        model.to(machine.device), channels, feed, np.arange(images), machine, Tracker(False), MICRO
    ), what


def bare(bench: DistributedScoringContext) -> float:
    """Seconds of the forward pass alone over this rank's batches."""
    ranks = bench.environment.comm
    lists = shard(micro_batches(bench.ids, MICRO), ranks.rank, ranks.world)
    start = time.perf_counter()
    with torch.no_grad():
        for batch in bench.loader.batches(lists):
            bench.model(batch.images)
    return time.perf_counter() - start


def scored(bench: DistributedScoringContext) -> float:
    """Seconds of graph scoring over the same batches."""
    kind = methods.find("graph")
    bench.environment.comm.barrier()
    start = time.perf_counter()
    kind(kind.Options()).score(bench)
    return time.perf_counter() - start


def overhead(images: int, pairs: int) -> dict[str, float]:
    bench, _ = bench_of(images, DistributedEnvironment.single_process())
    small, _ = bench_of(200, DistributedEnvironment.single_process())
    bare(small), scored(small)
    found = [(bare(bench), scored(bench)) for _ in range(pairs)]
    return {
        "bare_s": statistics.median(a for a, _ in found),
        "scored_s": statistics.median(b for _, b in found),
        "ratio": statistics.median(b / a for a, b in found),
    }


def memory(images: int) -> dict[str, float]:
    """Peak resident megabytes of a pass above those of the bare pass, each pass in a fresh process."""
    peaks = {}
    for what in ("bare", "scored"):
        for count in (images // 4, images):
            command = [sys.executable, __file__, "--worker", what, "--images", str(count)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            peaks[what, count] = float(output.split()[-1])
    return {
        "quarter_mb": peaks["scored", images // 4] - peaks["bare", images // 4],
        "whole_mb": peaks["scored", images] - peaks["bare", images],
    }


class Peak(threading.Thread):
    """Watches this process's resident memory every 2 ms, so that what was loaded before does not hide a pass."""

    def __init__(self):
        super().__init__(daemon=True)
        self.highest, self.process, self.watching = 0, psutil.Process(), True
        self.start()

    def run(self) -> None:
        while self.watching:
            self.highest = max(self.highest, self.process.memory_info().rss)
            time.sleep(0.002)


def processes(images: int, pairs: int) -> dict[str, float]:
    """Seconds of scoring in 1 and in 2 processes with one thread each, in turn."""
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(pairs):
        for world in (1, 2):
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), __file__,
                "--worker", "ranks", "--images", str(images),
            ]  # fmt: skip
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            times[world].append(float(output.split()[-1]))
    return {
        "one_s": statistics.median(times[1]),
        "two_s": statistics.median(times[2]),
        "speedup": statistics.median(a / b for a, b in zip(times[1], times[2], strict=True)),
    }


def similarity(pairs: int) -> dict[str, float]:
    """The similarity stage of one layer: 512 channels, 4x4 maps, 100 images, two threads."""
    torch.set_num_threads(2)
    maps = torch.randn(100, 8, 4, 4, generator=torch.Generator().manual_seed(0)).repeat(1, 64, 1, 1)
    maps += 0.5 * torch.randn(maps.shape, generator=torch.Generator().manual_seed(1))
    site, times = HookPoint("conv", "conv", 512, "conv", True), []
    for _ in range(pairs + 1):
        tally = Accumulator(HashAgreement(8), [site], 100, torch.device("cpu"))
        start = time.perf_counter()
        tally.update(site, maps, torch.arange(100))
        gram = tally.tables["conv"]["gram"]
        ones = gram.diagonal()
        (ones[:, None] + ones[None, :] - 2 * gram).sum().item()
        times.append(time.perf_counter() - start)
    torch.set_num_threads(1)
    return {"seconds": statistics.median(times[1:])}


def worker(what: str, images: int) -> None:
    """One measurement in a process of its own; prints a single number."""
    torch.set_num_threads(1)
    if what == "ranks":
        machine = DistributedEnvironment.start()
        bench, _ = bench_of(images, machine)
        small, _ = bench_of(200, machine)
        scored(small)
        seconds = scored(bench)
        if machine.comm.is_main:
            print(seconds)
        shutdown(machine.comm)
        return
    bench, _ = bench_of(images, DistributedEnvironment.single_process())
    small, _ = bench_of(200, DistributedEnvironment.single_process())
    bare(small)
    del small
    peak = Peak()
    (bare if what == "bare" else scored)(bench)
    peak.watching = False
    print(peak.highest / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the same figures here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.worker:
        worker(given.worker, given.images)
        return
    body = {
        "machine": describe_environment(DistributedEnvironment.single_process())
        | {"memory_gb": round(psutil.virtual_memory().total / 2**30)},
        "data": bench_of(10, DistributedEnvironment.single_process())[1],
        "images": given.images,
        "pairs": given.pairs,
        "overhead": overhead(given.images, given.pairs),
        "processes": processes(given.images, given.pairs),
        "memory": memory(given.images),
        "similarity": similarity(given.pairs),
    }
    o, p, m, s = (body[key] for key in ("overhead", "processes", "memory", "similarity"))
    print(f"{body['machine']['processor']}, {body['machine']['cores']} cores; {body['data']}; {given.pairs} pairs")
    print(f"{'graph scoring of ResNet-56':58} {'measured':>10}  bound")
    rows = [
        (f"bare forward, {given.images} images, 1 thread", f"{o['bare_s']:.2f} s", ""),
        ("scoring, same batches", f"{o['scored_s']:.2f} s", ""),
        ("scoring / bare forward", f"{o['ratio']:.2f}", "at most 1.3 times as long"),
        ("2 processes / 1 process, 1 thread each", f"{p['speedup']:.2f}x", "at least 1.7x"),
        (f"peak memory above the bare pass, {given.images // 4} images", f"{m['quarter_mb']:.0f} MB", "under 200 MB"),
        (f"peak memory above the bare pass, {given.images} images", f"{m['whole_mb']:.0f} MB", "under 200 MB"),
        ("similarity of 512 channels, 4x4 maps, 100 images", f"{s['seconds'] * 1000:.1f} ms", "under 500 ms"),
    ]
    for name, value, bound in rows:
        print(f"{name:58} {value:>10}  {bound}")
    if given.json:
        given.json.write_text(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()

"""What a coalition costs: cached heads and tails against full passes; ranks; what a gate adds to a training step.

    OMP_NUM_THREADS=2 python benchmarks/shapley.py [--only tails|ranks|gate] [--images 200] [--coalitions 20]

VGG-16 for CIFAR (random weights: time does not depend on them) on the 2 threads of the machine, fp32. ``tails``: 20
coalitions on convolutions 3, 8 and 12, counted from 1, full and cut passes taking turns; beside it the ratio of
multiply-accumulates, which no cut can beat but for cache effects. ``ranks``: the same coalitions shared over 2
processes of 1 thread against 1 of 1 thread.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_prune import models
from dist_prune.data.datasets import ArraySource
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.methods.dirichlet.posteriors import Dirichlet
from dist_prune.methods.shapley.estimators import random_sets
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.gating import gate, gate_points
from dist_prune.pruning.hooks.masked_accuracy import MaskedAccuracyCache
from dist_prune.pruning.rng import seeded_generator
from dist_prune.pruning.selection import cost
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training.evaluation import num_correct
from dist_prune.training.tracking import Tracker

CONVS, BOUNDS, MICRO = (3, 8, 12), (1.1, 2.5, 8.0), 50


def network() -> tuple[nn.Module, DependencyGraph, list[str]]:
    """The network, its channels, the names of its convolutions in order."""
    torch.manual_seed(0)
    model = models.create("vgg16_bn_linear_cifar", 10, 3).eval()
    channels = trace_groups(model, torch.rand(1, 3, 32, 32))
    return model, channels, [name for name, layer in channels.layers.items() if layer.kind == "conv"]


def batches_of(images: int) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn((images, 3, 32, 32), generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (images,), generator=generator)

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(list(zip(pixels.split(MICRO), labels.split(MICRO), strict=True))[start:])

    return batches


def bound(channels: DependencyGraph, names: list[str], conv: int) -> float:
    """Multiply-accumulates of the whole network over those behind the convolution."""
    layers, behind = [n for n, layer in channels.layers.items() if layer.kind in ("conv", "linear")], 0
    after = layers[layers.index(names[conv - 1]) + 1 :]
    for name in after:
        layer = channels.layers[name]
        behind += layer.width_in * layer.width_out * layer.kernel * layer.positions
    return cost.macs(channels) / behind


def tails(images: int, coalitions: int, stacks: tuple[int, ...]) -> None:
    model, channels, names = network()
    batches = batches_of(images)
    games, largest = MaskedAccuracyCache(model, channels, batches), max(stacks)
    print(f"{coalitions} coalitions, {images} images, micro-batches of {MICRO}; {largest} in full, then cut, in turns")
    print("| conv | sets at a time | full s | cut s | ratio of sums | median ratio | bound asked | MACs ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for conv, asked in zip(CONVS, BOUNDS, strict=True):
        name = names[conv - 1]
        off = random_sets(channels.group(name).width, 0, coalitions, lambda n: seeded_generator(0, n))
        points = gate_points(channels, name)
        game = games.for_group(name, "consumed", 2**30)
        game.evaluate(off[:1], num_correct)  # the head, once: kept
        assert not game.runs_whole_network

        @torch.no_grad()
        def full(part: Tensor, name: str = name, points: list = points) -> list[int]:
            counts = []
            for row in part:
                with gate(model, points, {name: ~row}):
                    counts.append(sum(int(num_correct(model(x), y)) for x, y in batches(0)))
            return counts

        full(off[:1])
        whole: list[float] = []
        cut: dict[int, list[float]] = {stack: [] for stack in stacks}
        for part in off.split(largest):
            start = time.perf_counter()
            expected = full(part)
            whole.append(time.perf_counter() - start)
            for stack, times in cut.items():
                start = time.perf_counter()
                found = [n for few in part.split(stack) for n in game.evaluate(few, num_correct).tolist()]
                times.append(time.perf_counter() - start)
                assert found == expected, "the same images are right"
        for stack, times in cut.items():
            ratio = statistics.median(w / c for w, c in zip(whole, times, strict=True))
            print(
                f"| {conv} | {stack} | {sum(whole):.2f} | {sum(times):.2f} | {sum(whole) / sum(times):.2f} "
                f"| {ratio:.2f} | {asked} | {bound(channels, names, conv):.2f} |",
                flush=True,
            )


def shared(images: int, coalitions: int) -> None:
    """One process of ``ranks``: seconds of the shared coalitions on conv 3, heads included, printed by the first."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    model, channels, names = network()
    generator = np.random.default_rng(0)
    source = ArraySource(
        generator.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8),
        generator.integers(0, 10, images),
        tuple("abcdefghij"),
    )
    feed = ImageLoader(source, TransformConfig(32, (0.5,) * 3, (0.25,) * 3), torch.device("cpu"))
    machine = DistributedEnvironment(torch.device("cpu"), Communicator.of() if world > 1 else Communicator())
    bench = DistributedScoringContext(model, channels, feed, np.arange(images), machine, Tracker(False), MICRO)
    name = names[2]
    width = channels.group(name).width

    def run(job: int) -> list[int]:
        return bench.count_correct(name, random_sets(width, job, job + 1, lambda n: seeded_generator(0, n)))

    bench.map_jobs(list(range(1000, 1002)), run, keep="warm")
    machine.comm.barrier()
    start = time.perf_counter()
    bench.map_jobs(list(range(coalitions)), run, keep="timed")
    machine.comm.barrier()
    if machine.comm.is_main:
        print(f"SECONDS {time.perf_counter() - start:.3f}", flush=True)


def ranks(images: int, coalitions: int) -> None:
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3):
        for world in found:
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", __file__,
                "--only", "shared", "--images", str(images), "--coalitions", str(coalitions),
            ]  # fmt: skip
            out = subprocess.run(
                command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            found[world].append(float(out.stdout.split("SECONDS")[1].split()[0]))
    one, two = (statistics.median(times) for times in found.values())
    print(
        f"conv 3, {coalitions} coalitions: 1 rank {one:.2f} s, 2 ranks {two:.2f} s, ratio {one / two:.2f} (asked: 1.7)"
    )


def gate_cost() -> None:
    """A training step of the whole network at batch 100, without and with a gate on each group in turn."""
    model, channels, names = network()
    model.train()
    x, y = torch.randn(100, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.randint(0, 10, (100,))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    print("| gate on conv | step without s | with s | added |\n|---|---|---|---|")
    for conv in (1, *CONVS):
        name = names[conv - 1]
        posterior, points = Dirichlet(channels.group(name).width, 2.0, None), gate_points(channels, name)
        times: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(8):
            for gated in (False, True):
                start = time.perf_counter()
                if gated:
                    values = posterior.mean() * channels.group(name).width
                    with gate(model, points, {name: values}):
                        step()
                else:
                    step()
                if turn:
                    times[gated].append(time.perf_counter() - start)
        plain, more = statistics.median(times[False]), statistics.median(times[True])
        print(f"| {conv} | {plain:.3f} | {more:.3f} | {100 * (more / plain - 1):+.1f} % |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=("tails", "ranks", "gate", "shared"))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--coalitions", type=int, default=20)
    parser.add_argument("--stacks", type=int, nargs="+", default=[1, 4])
    given = parser.parse_args()
    if given.only == "shared":
        return shared(given.images, given.coalitions)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    about = describe_environment(DistributedEnvironment(torch.device("cpu"), Communicator()))
    print(f"{about['processor']}, {about['cores']} cores, {about['threads']} thread(s)")
    if given.only in (None, "tails"):
        tails(given.images, given.coalitions, tuple(given.stacks))
    if given.only in (None, "ranks"):
        ranks(given.images, given.coalitions)
    if given.only in (None, "gate"):
        gate_cost()
    return None


if __name__ == "__main__":
    main()

"""What a pruned network is worth where it is used: images/s, time to load, time to look at a recipe.

    python benchmarks/deploy.py [--only speed,load,check] [--threads 2] [--repeats 15] [--runs 7]

timm's resnet50 at 224 pixels with random weights (times do not depend on them), cut by l1 to half its MACs with the
default rounding. speed: forward passes, dense and pruned taking turns, both as trained and both with their batch norms
folded (dist_prune.load(folder, fold=True)), contiguous and channels_last. load: dist_prune.load of the bundle against
timm.create_model and load_state_dict of the dense network's safetensors, taking turns, in this process and in fresh
ones (imports not counted). check: the whole command `dist-prune check` on a recipe for resnet50 and real images'
classes (needs $DIST_PRUNE_DATA/imagenet_1000), and the processor time in it.
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from dist_prune import methods
from dist_prune import models as backbones
from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.export import bundle
from dist_prune.pipeline.git import commit_of
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection import cost
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.statistic_collection import layer_weight
from dist_prune.training.latency import measure_latency

ROOT = Path(__file__).resolve().parents[1]
NAME, SIZE, CLASSES = "resnet50", 224, 1000
FRESH = """
import sys, time
import timm, torch
from safetensors.torch import load_file
import dist_prune.export.bundle
torch.set_num_threads({threads})
start = time.perf_counter()
{what}
print(time.perf_counter() - start)
"""


def pruned(name: str = NAME, size: int = SIZE) -> tuple[nn.Module, nn.Module, Plan, float]:
    """Dense and small network, the plan, the share of the MACs that is left."""
    torch.manual_seed(0)
    dense = backbones.create(name, CLASSES, 3).eval()
    channels = trace_groups(dense, torch.randn(1, 3, size, size))
    kind = methods.find("l1")
    norms = {s.name: layer_weight(dense, s).detach().double().abs().flatten(1).sum(1) for s in channels.hook_points}
    plan = kind(kind.Options()).select(norms, channels, SelectionRequest(target=("macs", 0.5), round_to=0))
    small = copy.deepcopy(dense)
    surgeon.apply_plan(small, channels, plan)
    return dense, small, plan, cost.macs(channels, plan.counts) / cost.macs(channels)


def export(folder: Path, small: nn.Module, plan: Plan) -> None:
    """The bundle that the export stage writes."""
    weights = small.state_dict()
    spec = {"name": NAME, "kwargs": {}, "num_classes": CLASSES, "in_chans": 3}
    text = bundle.manifest_json(
        spec, plan, {"size": SIZE, "mean": [0.5] * 3, "std": [0.25] * 3}, tuple(map(str, range(CLASSES))), weights, {}
    )
    folder.mkdir()
    (folder / bundle.MANIFEST).write_text(text)
    tensor_files.save_tensors(folder / bundle.WEIGHTS, weights)


def in_turns(runs: int, acts: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Seconds of each, one after the other, after a turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(runs + 1):
        for name, act in acts.items():
            seconds = act()
            if turn:
                times[name].append(seconds)
    return times


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """Median of the ratios of neighbours."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def here(act: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        act()
        return time.perf_counter() - start

    return timed


def fresh(what: str, threads: int) -> Callable[[], float]:
    code = FRESH.format(what=what, threads=threads)
    return lambda: float(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    )


def speed(dense: nn.Module, small: nn.Module, repeats: int, threads: int) -> None:
    models = {"dense": dense, "pruned": small}
    for name in ("dense", "pruned"):
        models[f"{name}, folded"] = bundle.fuse(copy.deepcopy(models[name]), (3, SIZE, SIZE))
        models[f"{name}, folded, channels_last"] = copy.deepcopy(models[f"{name}, folded"]).to(
            memory_format=torch.channels_last
        )
    times = measure_latency(models, (3, SIZE, SIZE), (8, 1), repeats, torch.device("cpu"), threads)
    for batch in ("8", "1"):
        for form in ("", ", folded", ", folded, channels_last"):
            one, two = times[f"dense{form}"][batch], times[f"pruned{form}"][batch]
            print(f"| images/s, batch {batch}{form} | dense {one['images_per_s']:.1f} | "
                  f"pruned {two['images_per_s']:.1f} | "
                  f"{one['ms'] / two['ms']:.2f}x (of the best passes {one['ms_best'] / two['ms_best']:.2f}x) | "
                  f"{'at least 1.7x' if batch == '8' else ''} |", flush=True)  # fmt: skip


def loading(folder: Path, runs: int, threads: int) -> None:
    file = folder / "dense.safetensors"

    def plain() -> None:
        timm.create_model(NAME, num_classes=CLASSES).load_state_dict(load_file(file))

    words = {
        "load": f"dist_prune.export.bundle.load({str(folder / 'bundle')!r})",
        "plain": f"timm.create_model({NAME!r}, num_classes={CLASSES}).load_state_dict(load_file({str(file)!r}))",
    }
    ways = {
        "this process": {"load": here(lambda: bundle.load(folder / "bundle")), "plain": here(plain)},
        "fresh processes": {name: fresh(what, threads) for name, what in words.items()},
    }
    for where, acts in ways.items():
        times = in_turns(runs, acts)
        ms = {name: 1000 * statistics.median(found) for name, found in times.items()}
        print(f"| load, {where} | timm, dense {ms['plain']:.0f} ms | bundle {ms['load']:.0f} ms | "
              f"{ratio(times, 'load', 'plain'):.2f} times as long | under 1.5 |", flush=True)  # fmt: skip


def checking(runs: int) -> None:
    command = [
        sys.executable, "-m", "dist_prune.cli", "check", "resnet50_graph",
        f"data.root={Path(os.environ['DIST_PRUNE_DATA'], 'imagenet_1000')}", "data.train_split=val",
    ]  # fmt: skip
    run = here(lambda: subprocess.run(command, check=True, capture_output=True, cwd=ROOT))
    before = os.times()
    times = [run() for _ in range(runs)]
    after = os.times()
    busy = (after.children_user + after.children_system - before.children_user - before.children_system) / runs
    print(f"| dist-prune check {command[4]} | median {statistics.median(times):.1f} s, slowest {max(times):.1f} s | "
          f"of a processor {busy:.1f} s | | under 10 s |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="speed,load,check", help="some of the three, commas between")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--runs", type=int, default=7)
    given = parser.parse_args()
    asked = given.only.split(",")
    if not set(asked) <= {"speed", "load", "check"}:
        parser.error(f"--only: speed, load, check, with commas between; got {given.only!r}")
    torch.set_num_threads(given.threads)
    facts = describe_environment(DistributedEnvironment.single_process())
    print(f"{facts['processor']}, {given.threads} thread(s), torch {facts['packages']['torch']}, seed 0, commit "
          f"{commit_of(Path(__file__))}\n")  # fmt: skip
    print("| what | | | ratio | bound |\n|---|---|---|---|---|")
    if {"speed", "load"} & set(asked):
        dense, small, plan, share = pruned()
        print(f"| MACs left | {share:.3f} | | | |", flush=True)
        if "speed" in asked:
            speed(dense, small, given.repeats, given.threads)
        if "load" in asked:
            with tempfile.TemporaryDirectory() as name:
                export(Path(name, "bundle"), small, plan)
                tensor_files.save_tensors(Path(name, "dense.safetensors"), dense.state_dict())
                loading(Path(name), given.runs, given.threads)
    if "check" in asked:
        checking(3)


if __name__ == "__main__":
    main()

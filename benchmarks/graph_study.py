"""Redundancy graphs on the pretrained option-A CIFAR-10 ResNets: what the thresholds cut and cost.

    python benchmarks/graph_study.py cut [--depth 20 32 44 56] [--tested 10000] [--json FILE]
    python benchmarks/graph_study.py images [--json FILE]
    python benchmarks/graph_study.py fidelity [--depth 20 32 44 56] [--json FILE]
    python benchmarks/graph_study.py finetune [--depth 20 56] [--tested 10000] [--json FILE]

``cut``: graph at four thresholds beside random and l1 at the same MACs; top-1 after surgery, nothing trained.
``images``: how the kept set moves from 100 to 10,000 calibration images (ResNet-56).
``fidelity``: the kept sets of the released program's way of scoring.
``finetune``: one epoch on the first 10,000 training images by the recipe (ResNet-56 at 0.7 only).
Needs DIST_PRUNE_DATA with cifar10.npz and weights/. Prints Markdown; --json keeps every figure.
"""

import argparse
import copy
import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune import methods, models
from dist_prune.config import loading
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.sampling import calibration_ids
from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.methods.base import Method
from dist_prune.pipeline.git import commit_of
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection import cost
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training.evaluation import evaluate
from dist_prune.training.loop import Loop
from dist_prune.training.tracking import Tracker
from dist_prune.training.trainer import Trainer

THRESHOLDS = (0.65, 0.7, 0.75, 0.8)
LOOK = TransformConfig(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), augment="crop_flip")


def method(name: str, **options: Any) -> Method:
    kind = methods.find(name)
    return kind(kind.Options.model_validate(options))


class Subject:
    """A pretrained network, its channels, and both splits."""

    def __init__(self, depth: int, tested: int):
        place = Path(os.environ["DIST_PRUNE_DATA"])
        self.machine = DistributedEnvironment.single_process()
        self.model = models.create(f"resnet{depth}_cifar", 10, 3).eval()
        weights = place / f"weights/resnet{depth}_cifar10.safetensors"
        tensor_files.load_strictly(self.model, tensor_files.read_weights(weights), str(weights))
        self.channels = trace_groups(self.model, torch.randn(1, 3, 32, 32))
        self.train, self.test = (
            ImageLoader(open_source("npz", str(place / "cifar10.npz"), "", train), LOOK, self.machine.device)
            for train in (True, False)
        )
        self.tested = np.arange(tested)

    def scores(self, name: str, images: int, seed: int, **options: Any) -> dict[str, Tensor]:
        ids = calibration_ids(self.train.source.labels, images, seed)
        bench = DistributedScoringContext(
            self.model, method(name).prunable(self.channels), self.train, ids, self.machine, Tracker(False), seed=seed
        )
        return method(name, **options).score(bench)

    def kept(self, plan: Plan) -> set[tuple[str, int]]:
        """(group, filter) that stay, of the free groups."""
        return {(group.name, c) for group in self.channels.free for c in plan.kept(group.name)}

    def plan(self, name: str, scores: Mapping[str, Tensor], request: SelectionRequest) -> Plan:
        return method(name).select(scores, method(name).prunable(self.channels), request)

    def cut(self, plan: Plan) -> nn.Module:
        small = copy.deepcopy(self.model)
        surgeon.apply_plan(small, self.channels, plan)
        return small

    def top1(self, model: nn.Module) -> float:
        return evaluate(model, self.test, 250, self.machine.comm, Tracker(False), ids=self.tested)["top1"]

    def left(self, plan: Plan) -> tuple[float, float]:
        """Shares of MACs and parameters that are left."""
        macs = cost.macs(self.channels, plan.counts) / cost.macs(self.channels)
        return macs, cost.params(self.channels, plan.counts) / cost.params(self.channels)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def study_cut(given: argparse.Namespace) -> dict[str, Any]:
    """Every net, threshold and seed; random and l1 get the MACs that graph left at the same seed (l1: the first)."""
    body: dict[str, Any] = {}
    print("| network | threshold | MACs | parameters | graph | l1 | random |\n|---|---|---|---|---|---|---|")
    for depth in given.depth:
        subject = Subject(depth, given.tested)
        dense = subject.top1(subject.model)
        print(f"| ResNet-{depth} | dense | | | {dense:.2f} | | |", flush=True)
        graphs = {seed: subject.scores("graph", 100, seed) for seed in given.seeds}
        controls = {("l1", 0): subject.scores("l1", 1, 0)}
        controls |= {("random", seed): subject.scores("random", 1, seed) for seed in given.seeds}
        rows = body[f"resnet{depth}"] = {"dense": dense}
        for threshold in given.at or THRESHOLDS:
            row: dict[str, Any] = {"macs": [], "params": [], "graph": [], "l1": [], "random": []}
            for seed in given.seeds:
                plan = subject.plan("graph", graphs[seed], SelectionRequest(threshold=threshold))
                macs, params = subject.left(plan)
                row["macs"].append(100 * (macs - 1))
                row["params"].append(100 * (params - 1))
                row["graph"].append(subject.top1(subject.cut(plan)))
                for name in ("l1", "random"):
                    if (name, seed) in controls:
                        other = subject.plan(name, controls[name, seed], SelectionRequest(target=("macs", macs)))
                        row[name].append(subject.top1(subject.cut(other)))
            rows[str(threshold)] = row
            cells = (spread(row[key]) for key in ("macs", "params", "graph", "l1", "random"))
            print(f"| ResNet-{depth} | {threshold} | {' | '.join(cells)} |", flush=True)
    return body


def study_images(given: argparse.Namespace) -> dict[str, Any]:
    """Kept sets of ResNet-56 by number of calibration images (nested draws of seed 0; other seeds at 100)."""
    subject = Subject(56, 10)
    draws = [(100, 0), (100, 1), (100, 2), (300, 0), (1000, 0), (3000, 0), (10000, 0)]
    kept: dict[tuple[int, int], dict[float, set[tuple[str, int]]]] = {}
    shares: dict[tuple[int, int], dict[float, float]] = {}
    for images, seed in draws:
        scores = subject.scores("graph", images, seed)
        plans = {t: subject.plan("graph", scores, SelectionRequest(threshold=t)) for t in THRESHOLDS[:3]}
        kept[images, seed] = {t: subject.kept(plan) for t, plan in plans.items()}
        shares[images, seed] = {t: subject.left(plan)[0] for t, plan in plans.items()}
    body: dict[str, Any] = {}
    total = sum(group.width for group in subject.channels.free)
    print(f"Free filters: {total}\n")
    print("| threshold | images | seed | kept | MACs | same filters as with 10,000 | kept by one only |")
    print("|---|---|---|---|---|---|---|")
    for threshold in THRESHOLDS[:3]:
        last = kept[10000, 0][threshold]
        for key in draws:
            mine = kept[key][threshold]
            share, differ = len(mine & last) / len(mine | last), len(mine ^ last)
            told = {"kept": len(mine), "macs": shares[key][threshold], "overlap": share}
            body[f"{threshold}/{key[0]}/{key[1]}"] = told
            print(
                f"| {threshold} | {key[0]} | {key[1]} | {len(mine)} | {100 * (shares[key][threshold] - 1):.1f} % | "
                f"{100 * share:.1f} % | {differ} |"
            )
    return body


def study_fidelity(given: argparse.Namespace) -> dict[str, Any]:
    """The same 100 images of seed 0, scored correctly and as the released program does; and another seed's."""
    body: dict[str, Any] = {}
    print("| network | threshold | MACs, correct | MACs, as released | same filters | same, two seeds, correct |")
    print("|---|---|---|---|---|---|")
    for depth in given.depth:
        subject = Subject(depth, 10)
        found = [
            subject.scores("graph", 100, 0),
            subject.scores("graph", 100, 0, fidelity="as_released"),
            subject.scores("graph", 100, 1),
        ]
        for threshold in THRESHOLDS:
            plans = [subject.plan("graph", scores, SelectionRequest(threshold=threshold)) for scores in found]
            macs = [100 * (subject.left(plan)[0] - 1) for plan in plans]
            ours, theirs, other = map(subject.kept, plans)
            same = [100 * len(ours & set_) / len(ours | set_) for set_ in (theirs, other)]
            body[f"resnet{depth}/{threshold}"] = {"macs": macs, "same": same}
            cells = " | ".join(f"{share:.1f} %" for share in (*macs[:2], *same))
            print(f"| ResNet-{depth} | {threshold} | {cells} |", flush=True)
    return body


def study_finetune(given: argparse.Namespace) -> dict[str, Any]:
    """One epoch on the first 10,000 training images with the finetune section of the recipe."""
    body: dict[str, Any] = {}
    recipe = loading.load("resnet56_cifar10_graph", ["finetune.epochs=1"], methods.options_of)
    print("| network | threshold | MACs | parameters | after surgery | after one epoch |\n|---|---|---|---|---|---|")
    for depth in given.depth:
        subject = Subject(depth, given.tested)
        for threshold in given.at or ((0.7,) if depth == 56 else THRESHOLDS[:3]):
            row: dict[str, list[float]] = {"macs": [], "params": [], "pruned": [], "finetuned": []}
            for seed in given.seeds:
                plan = subject.plan("graph", subject.scores("graph", 100, seed), SelectionRequest(threshold=threshold))
                small = subject.cut(plan)
                macs, params = subject.left(plan)
                row["macs"].append(100 * (macs - 1))
                row["params"].append(100 * (params - 1))
                row["pruned"].append(subject.top1(small))
                ids = np.arange(10_000)
                loop = Loop(recipe.finetune, subject.train, subject.machine, Tracker(False), seed, "finetune", ids)
                Trainer(small, loop, lambda network: {"top1": 0.0, "loss": 0.0}, classes=10).run()
                row["finetuned"].append(subject.top1(small.eval()))
            body[f"resnet{depth}/{threshold}"] = row
            print(f"| ResNet-{depth} | {threshold} | {' | '.join(map(spread, row.values()))} |", flush=True)
    return body


STUDIES = {"cut": study_cut, "images": study_images, "fidelity": study_fidelity, "finetune": study_finetune}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--depth", type=int, nargs="+", choices=(20, 32, 44, 56))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="cut and finetune: a part of the study")
    parser.add_argument("--at", type=float, nargs="+", help="cut and finetune: only these thresholds")
    parser.add_argument("--tested", type=int, default=10_000, help="so many first test images are evaluated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every figure here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    given.depth = given.depth or ((20, 56) if given.study == "finetune" else (20, 32, 44, 56))
    body = STUDIES[given.study](given)
    told = {
        "machine": describe_environment(DistributedEnvironment.single_process()),
        "commit": commit_of(Path(__file__)),
        "seeds": given.seeds,
        "figures": body,
    }
    if given.json:
        given.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()

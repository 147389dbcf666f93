"""MINT on real MNIST: the estimator as it should be, as it was released, and random blocks, at the same rates.

    DIST_PRUNE_DATA=... python benchmarks/mint_study.py --out FOLDER [--minutes 9] [--epochs 3] [--headline-samples 650]

Each row is kept in FOLDER/rows.jsonl as soon as it is there; the same command goes on where it stopped, and prints the
tables of what is there. Experiment 1: 784-500-300-10, groups 100 x 250 on the second layer, 96.2 % of its weights cut.
Experiment 2: group numbers and sample sizes, at the rates of the paper's table. Retraining starts at the dense weights.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from dist_prune import models
from dist_prune.config.training import Training
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.methods.mint import Mint
from dist_prune.methods.mint.options import Options
from dist_prune.pruning.plan.block_masks import mask_violations, weight_masks, weights_left
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training.evaluation import evaluate
from dist_prune.training.loop import Loop
from dist_prune.training.tracking import Tracker
from dist_prune.training.trainer import Trainer

ESTIMATORS, SEEDS = ("correct", "as_released", "random"), (0, 1, 2)
# (child groups, parent groups, images per class, share of the second layer that is cut): the paper's table
HEADLINE = (100, 250, 650, 0.9620)
GROUPS = {5: 0.8627, 10: 0.8725, 20: 0.8848, 50: 0.9187}  # 250 images per class
SAMPLES = {150: 0.8535, 250: 0.8848, 450: 0.8872, 650: 0.8970}  # 20 groups


class Study:
    """Dense network, scores and rows in one folder."""

    def __init__(self, out: Path, epochs: int, dense_epochs: int):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.epochs, self.dense_epochs = out, epochs, dense_epochs
        self.machine = DistributedEnvironment(torch.device("cpu"), Communicator())
        look, root = TransformConfig(28, (0.0,), (1.0,)), os.environ["DIST_PRUNE_DATA"]
        self.train, self.test = (
            ImageLoader(open_source("mnist", root, "", flag), look, self.machine.device) for flag in (True, False)
        )
        torch.manual_seed(0)
        self.model = models.create("mlp_mnist", 10, 1).eval()
        self.channels = trace_groups(self.model, torch.rand(1, 1, 28, 28))

    def dense(self) -> None:
        """The dense weights, trained once."""
        file = self.out / "dense.safetensors"
        if not file.exists():
            self.fit(self.model, self.dense_epochs, 0, {})
            tensor_files.save_tensors(file, self.model.state_dict())
        self.model.load_state_dict(tensor_files.read_tensors(file)[0])

    def fit(self, model: torch.nn.Module, epochs: int, seed: int, masks: dict[str, torch.Tensor]) -> None:
        """The paper's training, its 30 epochs and milestones 10 and 20 shortened to ``epochs``."""
        settings = Training(
            epochs=epochs, batch=256, lr=0.1, nesterov=True, weight_decay=1e-4, decay_norm_bias=True, selection="last",
            schedule="multistep", milestones=(round(epochs / 3), round(2 * epochs / 3)), gamma=0.1,
        )  # fmt: skip
        loop = Loop(settings, self.train, self.machine, Tracker(False), seed)
        Trainer(model, loop, lambda network: {}, classes=10, masks=masks).run()

    def top1(self, model: torch.nn.Module) -> float:
        return evaluate(model, self.test, 1000, self.machine.comm, Tracker(False))["top1"]

    def scores(self, estimator: str, child: int, parent: int, samples: int) -> dict[str, torch.Tensor]:
        """The table of one estimator; random: a permutation of the correct one's block numbers."""
        file = self.out / f"scores_{estimator}_{child}_{parent}_{samples}.safetensors"
        if not file.exists():
            method = self.method(estimator, child, parent, samples, 0.5)
            bench = DistributedScoringContext(
                self.model, self.channels, self.train, np.arange(len(self.train)), self.machine, Tracker(False), 1000
            )
            start = time.perf_counter()
            found = method.score(bench)
            tensor_files.save_tensors(
                file, found, {"seconds": time.perf_counter() - start, "threads": torch.get_num_threads()}
            )
        return tensor_files.read_tensors(file)[0]

    def method(self, estimator: str, child: int, parent: int, samples: int, rate: float) -> Mint:
        return Mint(
            Options(
                fidelity="as_released" if estimator == "as_released" else "correct", taps="consumed", skip=("fc3",),
                child_groups={"fc2": child}, parent_groups={"fc2": parent}, samples_per_class=samples, p=(rate,),
                quantile="weights", promote=False,
            )
        )  # fmt: skip

    def row(self, estimator: str, child: int, parent: int, samples: int, rate: float, seed: int) -> dict[str, Any]:
        """Cut, measure, retrain, measure. Ties at the threshold are broken by the seed, so that rates are equal."""
        scores = self.scores("correct" if estimator == "random" else estimator, child, parent, samples)
        edges = scores["fc2:edges"]
        generator = torch.Generator().manual_seed(1000 + seed)
        chance = torch.randperm(edges.numel(), generator=generator).view(edges.shape)
        order = chance if estimator == "random" else edges * edges.numel() + chance
        method = self.method("correct", child, parent, samples, rate)
        plan = method.select({**scores, "fc2:edges": order}, self.channels, SelectionRequest())
        small = copy.deepcopy(self.model)
        surgeon.apply_plan(small, self.channels, plan)
        masks = weight_masks(plan, self.channels, small.state_dict())
        left, whole = weights_left(plan, self.channels)["fc2"]
        before = self.top1(small)
        self.fit(small, self.epochs, seed, masks)
        assert not mask_violations(small.state_dict(), masks)
        return {"pruned": 100 * (1 - left / whole), "before": before, "top1": self.top1(small)}


def wanted(headline_samples: int) -> Iterator[tuple[str, str, int, int, int, float, int]]:
    """(experiment, estimator, child groups, parent groups, samples per class, rate, seed) of every row, in turns."""
    child, parent, _, rate = HEADLINE
    for seed in SEEDS:
        for estimator in ESTIMATORS:
            for groups, share in GROUPS.items():
                yield "groups", estimator, groups, groups, 250, share, seed
            for samples, share in SAMPLES.items():
                if samples != 250:  # the same row as 20 groups
                    yield "samples", estimator, 20, 20, samples, share, seed
            yield "headline", estimator, child, parent, headline_samples, rate, seed


def tables(rows: list[dict[str, Any]], dense: float) -> str:
    """Mean and standard deviation over seeds of every setting, one line each."""
    lines = [f"dense {dense:.2f} %", f"{'setting':34} {'pruned %':>9}  " + "  ".join(f"{e:>22}" for e in ESTIMATORS)]
    settings = sorted({(r["experiment"], r["child"], r["parent"], r["samples"]) for r in rows})
    for setting in settings:
        cells, pruned = [], 0.0
        for estimator in ESTIMATORS:
            found = [
                r for r in rows
                if (r["experiment"], r["child"], r["parent"], r["samples"], r["estimator"]) == (*setting, estimator)
            ]  # fmt: skip
            tops = [r["top1"] for r in found]
            spread = f" ± {statistics.stdev(tops):.2f}" if len(tops) > 1 else ""
            before = statistics.mean(r["before"] for r in found) if found else float("nan")
            cells.append(f"{before:6.2f} > {statistics.mean(tops):.2f}{spread} ({len(tops)})" if found else "-")
            pruned = found[0]["pruned"] if found else pruned
        name = f"{setting[0]}, {setting[1]} x {setting[2]} groups, {setting[3]}/class"
        lines.append(f"{name:34} {pruned:9.2f}  " + "  ".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9, help="start no row later than this")
    parser.add_argument("--epochs", type=int, default=3, help="of a retraining; the paper: 30")
    parser.add_argument("--dense-epochs", type=int, default=15, help="the paper: 30")
    parser.add_argument("--headline-samples", type=int, default=HEADLINE[2])
    parser.add_argument("--only", choices=("headline", "groups", "samples"), action="append", help="these experiments")
    parser.add_argument("--estimator", choices=ESTIMATORS, action="append", help="these estimators")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    start, study = time.monotonic(), Study(given.out, given.epochs, given.dense_epochs)
    study.dense()
    file = given.out / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    keys = ("experiment", "estimator", "child", "parent", "samples", "rate", "seed")
    done = {tuple(row[key] for key in keys) for row in rows}
    missing = [row for row in wanted(given.headline_samples) if row not in done]
    missing = [row for row in missing if row[0] in (given.only or row) and row[1] in (given.estimator or row)]
    for setting in missing:
        if time.monotonic() - start > 60 * given.minutes:
            break
        found = dict(zip(keys, setting, strict=True)) | study.row(*setting[1:])
        rows.append(found)
        with file.open("a") as out:
            out.write(json.dumps(found) + "\n")
    machine = describe_environment(study.machine)
    print(f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} thread(s); epochs {given.epochs}")
    print(tables(rows, study.top1(study.model)))


if __name__ == "__main__":
    main()

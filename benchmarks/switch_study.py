"""Dirichlet switches, Shapley values, Fisher, L1, L2 and random channels at given counts, on real data.

    DIST_PRUNE_DATA=... python benchmarks/switch_study.py lenet --out FOLDER [--minutes 5]
    DIST_PRUNE_DATA=... python benchmarks/switch_study.py resnet56 --out FOLDER [--minutes 5]

Each row is kept in FOLDER/rows.jsonl as soon as it is there, coalitions in FOLDER/measured_N.jsonl; the same command
goes on where it stopped and prints the table of what is there. ``lenet``: MNIST, 10-20-100-25 cut to 8-9-36-17, dense
network, coalitions and retraining all by the row's seed. ``resnet56``: CIFAR-10, pretrained, 11-18-30 inside the
blocks of each stage.
"""

import argparse
import copy
import json
import os
import statistics
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import nn

from dist_prune import methods, models
from dist_prune.config.training import Training
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.sampling import holdout_split
from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training.evaluation import evaluate
from dist_prune.training.loop import Loop
from dist_prune.training.tracking import Tracker
from dist_prune.training.trainer import Trainer

QUIET = Tracker(False)


@dataclass(frozen=True)
class Setting:
    """One network and what is done to it: counts kept, images of each kind of score, trainings."""

    backbone: str
    source: str
    root: str
    look: TransformConfig
    counts: dict[str, int]
    switches: dict[str, Any]
    held: int  # held-out images on which coalitions are measured
    seen: int  # training images that switches train on, and that fisher reads
    fisher: int
    tested: int
    dense: Training | None  # None: pretrained
    tune: Training
    rows: tuple[tuple[str, str, dict[str, Any]], ...] = field(repr=False)
    seeds: tuple[int, ...] = (0, 1, 2)


PLAIN: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("l1", "l1", {}), ("l2", "l2", {}), ("random", "random", {}), ("fisher", "fisher", {}),
)  # fmt: skip
SHAPLEY = tuple(
    (f"shapley {estimator}, {samples}", "shapley", {"estimator": estimator, "samples": samples})
    for samples in (30, 300) for estimator in ("kernel", "permutation")
)  # fmt: skip
POINT = ("dirichlet point", "dirichlet", {"variant": "point"})
INTEGRAL = ("dirichlet integral", "dirichlet", {"variant": "integral", "draws": 10})
LONGER = (
    ("dirichlet point, 10 epochs", "dirichlet", {"variant": "point", "epochs": 10}),
    ("dirichlet integral, 10 epochs", "dirichlet", {"variant": "integral", "draws": 10, "epochs": 10}),
)  # fmt: skip


def settings() -> dict[str, Setting]:
    root = os.environ["DIST_PRUNE_DATA"]
    paper = {"batch": 105, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant", "decay_norm_bias": True}
    lenet = Setting(
        "lenet5_mnist",
        "mnist",
        root,
        TransformConfig(28, (0.0,), (1.0,)),
        {"conv1": 8, "conv2": 9, "fc1": 36, "fc2": 17},
        {"epochs": 1, "batch": 105},
        500,
        10500,
        1000,
        10000,
        Training(epochs=2, lr=0.02, images=21000, selection="last", **paper),
        Training(epochs=1, lr=0.01, images=10500, selection="last", **paper),
        (*PLAIN, POINT, INTEGRAL, *SHAPLEY, *LONGER),
    )
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    resnet = Setting(
        "resnet56_cifar", "npz", f"{root}/cifar10.npz", TransformConfig(32, mean, std, augment="crop_flip"),
        {"layer1.*.conv1": 11, "layer2.*.conv1": 18, "layer3.*.conv1": 30},
        {"epochs": 1, "batch": 128, "jointly": True}, 100, 2560, 256, 2000, None,
        Training(
            epochs=1, batch=128, lr=0.01, images=2560, momentum=0.9, weight_decay=1e-4, schedule="constant",
            decay_norm_bias=True, selection="last",
        ),
        (*PLAIN, POINT, SHAPLEY[0], LONGER[0]),
    )  # fmt: skip
    return {"lenet": lenet, "resnet56": resnet}


class Study:
    """Networks and rows in one folder."""

    def __init__(self, name: str, setting: Setting, out: Path):
        out.mkdir(parents=True, exist_ok=True)
        self.name, self.set, self.out = name, setting, out
        self.machine = DistributedEnvironment(torch.device("cpu"), Communicator())
        sources = [open_source(setting.source, setting.root, "", flag) for flag in (True, False)]
        self.train, self.test = (ImageLoader(source, setting.look, self.machine.device) for source in sources)
        self.known: dict[int, nn.Module] = {}

    def dense(self, seed: int) -> nn.Module:
        """Trained once for each seed, on what is not held out; or pretrained."""
        setting = self.set
        key = seed if setting.dense is not None else 0
        if key not in self.known:
            torch.manual_seed(key)
            model = models.create(setting.backbone, 10, self.train.source.in_chans)
            file = self.out / f"dense_{key}.safetensors"
            if setting.dense is None:
                weights = Path(os.environ["DIST_PRUNE_DATA"]) / "weights/resnet56_cifar10.safetensors"
                tensor_files.load_strictly(model, tensor_files.read_weights(weights), str(weights))
            elif file.exists():
                model.load_state_dict(tensor_files.read_tensors(file)[0])
            else:
                self.fit(model, setting.dense, seed)
                tensor_files.save_tensors(file, model.state_dict())
            self.known[key] = model.eval()
        return self.known[key]

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(training ids, held-out ids)."""
        return holdout_split(np.arange(len(self.train)), 0.1, seed)

    def fit(self, model: nn.Module, training: Training, seed: int) -> None:
        ids = self.split(seed)[0]
        ids = np.random.default_rng(seed).permutation(ids)[: training.images or len(ids)]
        loop = Loop(training, self.train, self.machine, QUIET, seed, "study", np.sort(ids))
        Trainer(model, loop, lambda network: {}, classes=10).run()

    def top1(self, model: nn.Module) -> float:
        ids = np.arange(self.set.tested)
        return evaluate(model, self.test, 500, self.machine.comm, QUIET, ids=ids)["top1"]

    def row(self, label: str, name: str, options: dict[str, Any], seed: int) -> dict[str, Any]:
        """Score, cut, measure, retrain, measure."""
        setting, model = self.set, self.dense(seed)
        kind = methods.find(name)
        method = kind(kind.Options(**{**(setting.switches if name == "dirichlet" else {}), **options}))
        shape = (1, self.train.source.in_chans, setting.look.size, setting.look.size)
        channels = trace_groups(model, torch.rand(shape)).exclude(self._whole(model))
        train, held = self.split(seed)
        count = {"shapley": setting.held, "fisher": setting.fisher}.get(name, setting.seen)
        pool = held if method.calibration_split == "held_out" else train
        ids = np.sort(np.random.default_rng(seed).permutation(pool)[:count])
        bench = DistributedScoringContext(
            model, channels, self.train, ids, self.machine, QUIET, 100, seed,
            record=self.out / f"measured_{seed}.jsonl",
            lineage=f"{self.name} {seed} {count} {options.get('estimator')}",
        )  # fmt: skip
        start = time.perf_counter()
        scores = method.score(bench)
        seconds = time.perf_counter() - start
        plan = method.select(scores, channels, SelectionRequest(counts=setting.counts))
        small = copy.deepcopy(model)
        surgeon.apply_plan(small, channels, plan)
        before = self.top1(small)
        self.fit(small, setting.tune, seed)
        rows = method.table(scores, channels, SelectionRequest(counts=setting.counts))
        reliable = {r["group"]: round(r["reliability"], 3) for r in rows if "reliability" in r}
        return {"before": before, "after": self.top1(small.eval()), "seconds": seconds, "reliability": reliable}

    def _whole(self, model: nn.Module) -> list[str]:
        """Groups that no count names are not scored."""
        shape = (1, self.train.source.in_chans, self.set.look.size, self.set.look.size)
        channels = trace_groups(model, torch.rand(shape))
        named = channels.exclude(self.set.counts)
        return [group.name for group in named.free]


def table(rows: list[dict[str, Any]], setting: Setting) -> str:
    """Mean and standard deviation over seeds of every method."""
    lines = [f"| {'method':30} | {'before':>14} | {'after retraining':>16} | seeds | seconds to score |"]
    lines.append("|---|---|---|---|---|")
    for label, *_ in setting.rows:
        found = [row for row in rows if row["label"] == label]
        if not found:
            lines.append(f"| {label:30} | not measured | | 0 | |")
            continue
        cells = []
        for key in ("before", "after"):
            values = [row[key] for row in found]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        seconds = statistics.median(row["seconds"] for row in found)
        lines.append(f"| {label:30} | {cells[0]:>14} | {cells[1]:>16} | {len(found)} | {seconds:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("network", choices=("lenet", "resnet56"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5, help="start no row later than this")
    parser.add_argument("--only", default="*", metavar="GLOB", help="rows of these labels")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    start, setting = time.monotonic(), settings()[given.network]
    study, file = Study(given.network, setting, given.out), given.out / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["label"], row["seed"]) for row in rows}
    for seed in setting.seeds:
        for label, name, options in setting.rows:
            if (
                (label, seed) in done
                or not fnmatchcase(label, given.only)
                or time.monotonic() - start > 60 * given.minutes
            ):
                continue
            found = {"label": label, "seed": seed, **study.row(label, name, options, seed)}
            rows.append(found)
            print(found, flush=True)
            with file.open("a") as out:
                out.write(json.dumps(found) + "\n")
    about = describe_environment(study.machine)
    print(f"{about['processor']}, {about['cores']} cores, {about['threads']} thread(s)")
    tops = [study.top1(study.dense(seed)) for seed in setting.seeds[: 1 if setting.dense is None else None]]
    print(f"dense: {', '.join(f'{top:.2f}' for top in tops)} %, on {setting.tested} test images")
    print(table(rows, setting))


if __name__ == "__main__":
    main()

"""The Sensitivity Pruner on real CIFAR-10: ResNet-20 at keep ratio .6 against L1 and random at the same MACs.

    DIST_PRUNE_DATA=... python benchmarks/sensitivity_study.py --out FOLDER [--minutes 5] [--images 2400] [--tune 4000]

Each row is kept in FOLDER/rows.jsonl as soon as it is there; the same command goes on where it stopped, and prints the
tables of what is there. The schedule is shortened: one epoch of ``--images`` images a round (the paper: 8 epochs of
50,000), windows of 5 and ramp points of 4 updates, one finetuning epoch of ``--tune`` images (the paper: 200 epochs).
The second table is about the target alone: how stable it is between draws of the copy's weights (same batch).
"""

import argparse
import copy
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from dist_prune import methods, models
from dist_prune.config.training import Training
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.sampling import calibration_ids
from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.methods.base import TRAINED
from dist_prune.methods.sensitivity.method import Sensitivity
from dist_prune.methods.sensitivity.options import Options, Quirk
from dist_prune.methods.sensitivity.single_shot import SingleShotScore
from dist_prune.pruning.selection import cost
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training.evaluation import evaluate
from dist_prune.training.loop import Loop
from dist_prune.training.tracking import Tracker
from dist_prune.training.trainer import Trainer

SEEDS, KEEP, DRAWS = (0, 1, 2), 0.6, 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pretrained weights


class Study:
    """Dense network, images and rows in one folder."""

    def __init__(self, out: Path, images: int, tune: int, test: int):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.images, self.tune, self.tested = out, images, tune, test
        self.machine, root = (
            DistributedEnvironment(torch.device("cpu"), Communicator()),
            Path(os.environ["DIST_PRUNE_DATA"]),
        )
        look = TransformConfig(32, MEAN, STD, augment="crop_flip")
        self.train, self.test = (
            ImageLoader(open_source("npz", str(root / "cifar10.npz"), "", flag), look, self.machine.device)
            for flag in (True, False)
        )
        self.model = models.create("resnet20_cifar", 10, 3)
        self.model.load_state_dict(tensor_files.read_weights(root / "weights/resnet20_cifar10.safetensors"))
        self.channels = trace_groups(self.model.eval(), torch.zeros(1, 3, 32, 32))

    def method(self, *quirks: Quirk) -> Sensitivity:
        return Sensitivity(
            Options(keep=KEEP, epochs=1, batch=32, lr=1e-3, holdout=0, window=5, beta_every=4, quirks=quirks)
        )

    def bench(self, seed: int, folder: Path | None = None) -> DistributedScoringContext:
        ids = calibration_ids(self.train.source.labels, self.images, seed)
        name = f"study {seed}"
        return DistributedScoringContext(
            self.model, self.channels, self.train, ids, self.machine, Tracker(False), 50, seed, folder, name
        )

    def top1(self, model: nn.Module) -> float:
        ids = np.arange(self.tested)
        return evaluate(model, self.test, 250, self.machine.comm, Tracker(False), "test", ids)["top1"]

    def learned(self, seed: int) -> dict[str, Tensor]:
        file = self.out / f"scores_{seed}.safetensors"
        if not file.exists():
            bench, start = self.bench(seed, self.out / f"partial_{seed}"), time.perf_counter()
            found = self.method().score(bench)
            tensor_files.save_tensors(file, found, {"seconds": time.perf_counter() - start})
        return tensor_files.read_tensors(file)[0]

    def row(self, name: str, seed: int) -> dict[str, Any]:
        """Cut at the MACs that the learned masks leave, measure, finetune, measure."""
        paper, scores = self.method(), self.learned(seed)
        mine = paper.select(scores, self.channels, SelectionRequest())
        share = cost.macs(self.channels, mine.counts) / cost.macs(self.channels)
        model, plan = copy.deepcopy(self.model), mine
        if name == "sensitivity":
            model.load_state_dict({n.removeprefix(TRAINED): t for n, t in scores.items() if n.startswith(TRAINED)})
        else:
            kind = methods.find(name)
            other, inner = kind(kind.Options()), paper.prunable(self.channels)  # the same groups may be cut
            bench = self.bench(seed)
            bench.graph = inner
            plan = other.select(other.score(bench), inner, SelectionRequest(target=("macs", share)))
        surgeon.apply_plan(model, self.channels, plan)
        before = self.top1(model)
        settings = Training(
            epochs=1, batch=64, lr=0.01, images=self.tune, schedule="cosine", weight_decay=1e-4, selection="last",
            decay_norm_bias=True,
        )  # fmt: skip
        loop = Loop(settings, self.train, self.machine, Tracker(False), seed)
        Trainer(model, loop, lambda network: {}, classes=10).run()
        macs = cost.macs(self.channels, plan.counts) / cost.macs(self.channels)
        kept = sum(plan.counts[g.name] for g in paper.prunable(self.channels).free)
        return {"macs": macs, "kept": kept, "before": before, "top1": self.top1(model)}

    def stability(self, *quirks: Quirk) -> dict[str, list[float]]:
        """Group -> [mean kept share, its deviation, mean rank correlation of filter scores] over draws, one batch."""
        paper, bench = self.method(*quirks), self.bench(0)
        inner = paper.prunable(self.channels)
        shot = SingleShotScore(paper.options, bench, inner, inner.free, 1)
        batch = next(self.train.batches([bench.ids[:128]]))
        masks = [shot.compute(batch.images, batch.labels, draw) for draw in range(DRAWS)]
        out = {}
        for group in inner.free:
            shares = [float(target[group.name].double().mean()) for _, target in masks]
            values = [inputs[group.name].flatten(2).sum(2).flatten().detach().numpy() for inputs, _ in masks]
            pairs = [spearmanr(values[i], values[j]).statistic for i in range(DRAWS) for j in range(i)]
            out[group.name] = [statistics.mean(shares), statistics.stdev(shares), statistics.mean(pairs)]
        return out


def tables(rows: list[dict[str, Any]], body: dict[str, Any]) -> str:
    """Means and deviations over seeds; the target's stability."""
    lines = [
        f"dense {body['dense']:.2f} %",
        f"{'method':14} {'MACs %':>8} {'channels':>9} {'after surgery':>16} {'finetuned':>16}",
    ]
    for name in ("sensitivity", "l1", "random"):
        own = [row for row in rows if row["method"] == name]
        if own:
            cells = [[row[key] for row in own] for key in ("before", "top1")]
            shown = [f"{statistics.mean(c):.2f} ± {statistics.stdev(c) if len(c) > 1 else 0:.2f}" for c in cells]
            macs, kept = (statistics.mean(row[key] for row in own) for key in ("macs", "kept"))
            lines.append(f"{name:14} {100 * macs:8.1f} {kept:9.1f} {shown[0]:>16} {shown[1]:>16}  ({len(own)} seeds)")
    head = "".join(f"{title:>34}" for title in body["stability"])
    lines += [
        "",
        f"{'target, ' + str(DRAWS) + ' draws':18}{head}",
        f"{'':18}" + f"{'kept, deviation, rank corr.':>34}" * 2,
    ]
    for group in next(iter(body["stability"].values())):
        found = [table[group] for table in body["stability"].values()]
        cells = "".join(f"{f'{mean:.2f}  {spread:.2f}  {corr:+.2f}':>34}" for mean, spread, corr in found)
        lines.append(f"{group:18}{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5, help="no row is begun after so many")
    parser.add_argument("--images", type=int, default=2400, help="of a round")
    parser.add_argument("--tune", type=int, default=4000, help="images of the finetuning epoch")
    parser.add_argument("--test", type=int, default=2000, help="the first so many test images are judged")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    study, end = Study(given.out, given.images, given.tune, given.test), time.monotonic() + 60 * given.minutes
    file, facts = given.out / "rows.jsonl", given.out / "facts.json"
    if not facts.exists():
        body = {
            "machine": describe_environment(study.machine), "dense": study.top1(study.model),
            "stability": {"trained norms": study.stability(), "fresh norms": study.stability("fresh_norms")},
        }  # fmt: skip
        facts.write_text(json.dumps(body))
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for seed in SEEDS:
        for name in ("sensitivity", "l1", "random"):
            if any((row["method"], row["seed"]) == (name, seed) for row in rows) or time.monotonic() > end:
                continue
            rows.append({"method": name, "seed": seed, **study.row(name, seed)})
            with file.open("a") as out:
                out.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)
    print(tables(rows, json.loads(facts.read_text())))


if __name__ == "__main__":
    main()

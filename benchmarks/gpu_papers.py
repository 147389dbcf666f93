"""A paper's dense network from scratch and its rows of the graph table, on one GPU, resumable across machines.

    python benchmarks/gpu_papers.py NETWORK [--minutes 25] [--state FOLDER] [--seed 0] [--images N --epochs E]

NETWORK: resnet56p, vgg16, densenet40, resnet110p (CIFAR-10; $DIST_PRUNE_DATA has cifar10.npz). Trains it by its recipe,
then prunes and finetunes by each threshold of the paper's table: images on the device, bf16, channels_last, compiled
with CUDA graphs, a batch that divides 50,000. Asked to stop when the minutes are over; what is done lies in the state
folder (runs without what can be made again, in parts of 15 MiB, 48 MiB at most), and the same command with it resumes,
also on another machine. ``--images`` and ``--epochs`` make a dry run. ``--check`` prints the cost in images, and the
time at a number of images per second.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.pipeline.git import commit_of

LIMIT_MB = 48
PART = 15 * 2**20
KEPT = (".safetensors", ".json", ".jsonl", ".yaml")
SAVE_S = 25  # for which a run may go on after it was asked to stop


@dataclass(frozen=True)
class Row:
    """A row of the paper: threshold, points of top-1 lost, share of the FLOPs and of the parameters removed."""

    threshold: float
    drop: float
    flops: float
    params: float


@dataclass(frozen=True)
class Case:
    """A network, its recipe, its epochs (dense, finetuned), and the paper's rows (Li et al., Neurocomputing 2024)."""

    recipe: str
    epochs: tuple[int, int]
    rows: tuple[Row, ...]


CASES = {
    "resnet56p": Case("resnet56p_cifar10_graph", (200, 70), (
        Row(0.75, 0.09, 32.82, 12.85), Row(0.7, 0.38, 41.96, 18.93), Row(0.65, 0.84, 57.05, 33.60))),
    "vgg16": Case("vgg16_cifar10_graph", (200, 70), (
        Row(0.8, -0.14, 42.14, 76.80), Row(0.75, 0.17, 51.23, 83.42), Row(0.7, 0.57, 65.52, 88.77))),
    "densenet40": Case("densenet40_cifar10_graph", (200, 70), (
        Row(0.75, -0.10, 36.75, 19.80), Row(0.7, 0.01, 49.39, 35.72), Row(0.65, 0.94, 74.51, 66.41))),
    "resnet110p": Case("resnet110p_cifar10_graph", (200, 70), (
        Row(0.75, 0.02, 35.24, 8.81), Row(0.7, 0.44, 45.54, 15.32), Row(0.65, 1.67, 62.67, 32.11))),
}  # fmt: skip
FAST = ("precision=bf16", "channels_last=true", "batch=250")


class Study:
    """The runs of one network in one folder."""

    def __init__(self, name: str, given: argparse.Namespace, folder: Path):
        self.name, self.case, self.given, self.folder = name, CASES[name], given, folder
        self.deadline = time.monotonic() + 60 * given.minutes

    def command(self, run: str, *overrides: str) -> list[str]:
        fast = [*FAST, f"compile={self.given.compile}"] if torch.cuda.is_available() else ["batch=64"]
        words = [f"{section}.{key}" for section in ("train", "finetune") for key in fast]
        words += ["train.selection=last", "finetune.selection=last", "finetune.evaluate_every=10"]
        if self.given.images:
            words += [f"{section}.images={self.given.images}" for section in ("train", "finetune")]
        return [sys.executable, str(ROOT / "dist_prune/run.py"), "--recipe", self.case.recipe, "--run-dir",
                str(self.folder / run), "--seed", str(self.given.seed), *words, *overrides]  # fmt: skip

    def epochs(self) -> tuple[int, int]:
        return (self.given.epochs, self.given.epochs) if self.given.epochs else self.case.epochs

    def dense(self) -> bool:
        """Train the dense network and score it; whether it is done."""
        train, _ = self.epochs()
        words = [f"train.epochs={train}", "train.evaluate_every=10", "finetune.epochs=0", "select.threshold=0.7"]
        return self.run("dense", *words)

    def row(self, threshold: float) -> bool:
        """Prune and finetune by one threshold; whether it is done."""
        file = self.folder / "dense/dense.safetensors"
        return self.run(
            f"t{threshold}", "train.epochs=0", f"backbone.checkpoint={file}", f"select.threshold={threshold}",
            f"finetune.epochs={self.epochs()[1]}",
        )  # fmt: skip

    def run(self, name: str, *overrides: str) -> bool:
        """One run, asked to stop at the deadline; whether it finished."""
        if (self.folder / name / "report.json").is_file():
            return True
        left = self.deadline - time.monotonic()
        if left < 2 * SAVE_S:
            return False
        process = subprocess.Popen(self.command(name, *overrides), cwd=ROOT)
        try:
            code = process.wait(left - SAVE_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGUSR1)
            code = process.wait(4 * SAVE_S)
        if code not in (0, 3, 75):
            sys.exit(f"{name}: exit code {code}")
        return code in (0, 3)

    def table(self) -> str:
        """Markdown: the paper's figures beside ours."""
        heads = ("threshold", "paper: drop, FLOPs, params", "dense", "pruned", "finetuned", "drop", "thop", "params")
        lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for row in self.case.rows:
            file = self.folder / f"t{row.threshold}/report.json"
            paper = f"{row.drop} / -{row.flops} % / -{row.params} %"
            if not file.is_file():
                lines.append(f"| {row.threshold} | {paper} | not run | | | | | |")
                continue
            body = json.loads(file.read_text())
            dense, pruned, tuned = (body[name] for name in ("dense", "pruned", "finetuned"))
            cut = {key: 100 * (1 - tuned[key] / dense[key]) for key in ("thop", "params")}
            lines.append(
                f"| {row.threshold} | {paper} | {dense['top1']:.2f} | {pruned['top1']:.2f} | {tuned['top1']:.2f} | "
                f"{dense['top1'] - tuned['top1']:.2f} | -{cut['thop']:.2f} % | -{cut['params']:.2f} % |"
            )
        return "\n".join(lines)


def unpack(state: Path, folder: Path) -> None:
    parts = sorted(state.glob("part_*"))
    if parts:
        with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as tar:
            tar.extractall(folder, filter="data")


def pack(state: Path, folder: Path) -> None:
    """What a later start needs: artifacts, checkpoints, ledgers; no exports, no TensorBoard. A finished run leaves its
    report and its ledger alone."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file in sorted(folder.rglob("*")):
            run, *rest = file.relative_to(folder).parts
            over = run != "dense" and (folder / run / "report.json").is_file()
            if not file.is_file() or file.suffix not in KEPT or {"export", "tensorboard"} & set(rest):
                continue
            if not (over and file.suffix == ".safetensors"):
                tar.add(file, file.relative_to(folder))
    body = buffer.getvalue()
    state.mkdir(parents=True, exist_ok=True)
    for part in state.glob("part_*"):
        part.unlink()
    for number, start in enumerate(range(0, len(body), PART)):
        (state / f"part_{number}").write_bytes(body[start : start + PART])
    size = len(body) / 2**20
    print(f"state: {state}, {size:.1f} MiB" + (f", MORE than {LIMIT_MB}" if size > LIMIT_MB else ""))


def costs(study: Study, rate: float) -> dict[str, Any]:
    """Images that go through training, and the hours at a rate in images per second."""
    images, (train, tune) = study.given.images or 50_000, study.epochs()
    seen = images * (train + len(study.case.rows) * tune)
    return {"images": seen, "images_per_s": rate, "minutes": round(seen / rate / 60, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=CASES)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--compile", default="reduce-overhead", help="false, true, reduce-overhead, max-autotune")
    parser.add_argument("--check", type=float, metavar="IMAGES_PER_S", help="print the cost at such a rate, and end")
    given = parser.parse_args()
    # one place on every machine: a run that goes on names the same dense network
    folder = Path(tempfile.gettempdir(), f"gpu_papers_{given.network}_{given.seed}")
    study = Study(given.network, given, folder)
    if given.check:
        print(json.dumps(costs(study, given.check)))
        return
    folder.mkdir(exist_ok=True)
    state = given.state or Path(f"gpu_papers_{given.network}_{given.seed}_state")
    unpack(state, folder)
    try:
        if study.dense():
            all(study.row(row.threshold) for row in study.case.rows)
    finally:
        pack(state, folder)
    facts = describe_environment(DistributedEnvironment.single_process())
    commit = commit_of(ROOT / "README.md") or os.environ.get("DIST_PRUNE_COMMIT")
    print(f"\n{given.network}, seed {given.seed}, {facts['gpu'] or facts['processor']}, torch "
              f"{facts['packages']['torch']}, commit {commit}\n\n{study.table()}")  # fmt: skip


if __name__ == "__main__":
    main()

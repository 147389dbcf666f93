"""A paper's dense network from scratch and its rows of the graph table, on one GPU, resumable across machines.

    python benchmarks/gpu_papers.py NETWORK [--minutes 25] [--state FOLDER] [--seed 0] [--seeds 1] [--check RATE]

NETWORK, in order of worth: resnet56p, vgg16, densenet40, resnet110p (CIFAR-10; $DIST_PRUNE_DATA has cifar10.npz).
Trains it by its recipe, then prunes and finetunes by each threshold of the paper's table: images on the device, bf16,
channels_last, compiled with CUDA graphs, a batch that divides 50,000. ``--seeds 3`` goes on with the next seeds while
there is time; the table has the mean of those that finished. Asked to stop when the minutes are over; what is done lies
in the state folder (runs without what can be made again, in parts of 15 MiB, 48 MiB at most), and the same command with
it resumes, also on another machine. Where the state of a training would be more than that (VGG-16), that training
starts again there, and the weights that rows begin with are float16. ``--images`` and ``--epochs`` make a dry run.
``--check`` prints the cost in images, and the time at a number of images per second.
"""

import argparse
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.pipeline.git import commit_of

LIMIT = 48 * 2**20  # bytes of state
PART = 15 * 2**20
LARGE = 24 * 2**20  # dense weights above this leave room for nothing else: they are kept as float16
KEPT = (".safetensors", ".sha256", ".json", ".jsonl", ".yaml")
NOT_KEPT = {"export", "tensorboard"}
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
ROWS = 3  # of each network
FAST = ("precision=bf16", "channels_last=true", "batch=250")


class Study:
    """The runs of one network in one folder, SEED/RUN below it."""

    def __init__(self, name: str, given: argparse.Namespace, folder: Path):
        self.name, self.case, self.given, self.folder = name, CASES[name], given, folder
        self.deadline = time.monotonic() + 60 * given.minutes

    def command(self, seed: int, run: str, *overrides: str) -> list[str]:
        fast = [*FAST, f"compile={self.given.compile}"] if torch.cuda.is_available() else ["batch=64"]
        words = [f"{section}.{key}" for section in ("train", "finetune") for key in fast]
        words += ["train.selection=last", "finetune.selection=last", "finetune.evaluate_every=10"]
        if self.given.images:
            words += [f"{section}.images={self.given.images}" for section in ("train", "finetune")]
        return [sys.executable, str(ROOT / "dist_prune/run.py"), "--recipe", self.case.recipe, "--run-dir",
                str(self.folder / str(seed) / run), "--seed", str(seed), *words, *overrides]  # fmt: skip

    def epochs(self) -> tuple[int, int]:
        return (self.given.epochs, self.given.epochs) if self.given.epochs else self.case.epochs

    def all_runs(self, save: Callable[[], None]) -> None:
        """Every seed's dense network and rows, as far as the time goes; ``save`` after each."""
        for seed in range(self.given.seed, self.given.seed + self.given.seeds):
            for act in (self.dense, *(partial(self.row, row.threshold) for row in self.case.rows)):
                done = act(seed)
                save()
                if not done:
                    return

    def dense(self, seed: int) -> bool:
        """Train the dense network and score it; whether it is done."""
        train, _ = self.epochs()
        words = [f"train.epochs={train}", "train.evaluate_every=10", "finetune.epochs=0", "select.threshold=0.7"]
        return self.run(seed, "dense", *words)

    def row(self, threshold: float, seed: int) -> bool:
        """Prune and finetune by one threshold; whether it is done."""
        return self.run(
            seed, f"t{threshold}", "train.epochs=0", f"backbone.checkpoint={start_of(self.folder / str(seed))}",
            f"select.threshold={threshold}", f"finetune.epochs={self.epochs()[1]}",
        )  # fmt: skip

    def run(self, seed: int, name: str, *overrides: str) -> bool:
        """One run, asked to stop at the deadline; whether it finished."""
        place = self.folder / str(seed) / name
        if is_over(place):
            return True
        left = self.deadline - time.monotonic()
        if left < 2 * SAVE_S:
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(self.command(seed, name, *overrides), cwd=ROOT)
        try:
            code = process.wait(left - SAVE_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGUSR1)
            code = process.wait(4 * SAVE_S)
        if code not in (0, 3, 75):
            sys.exit(f"{name}, seed {seed}: exit code {code}")
        return code in (0, 3)

    def table(self) -> str:
        """Markdown: the paper's figures beside ours, means over the seeds that finished a row."""
        heads = ("threshold", "paper: drop, FLOPs, params", "seeds", "dense", "pruned", "finetuned", "drop")
        heads += ("thop", "params")
        lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for row in self.case.rows:
            paper = f"{row.drop} / -{row.flops} % / -{row.params} %"
            bodies = [
                json.loads(file.read_text()) for file in sorted(self.folder.glob(f"*/t{row.threshold}/report.json"))
            ]
            if not bodies:
                lines.append(f"| {row.threshold} | {paper} | not run | | | | | | |")
                continue
            top1 = {name: [body[name]["top1"] for body in bodies] for name in ("dense", "pruned", "finetuned")}
            drops = [a - b for a, b in zip(top1["dense"], top1["finetuned"], strict=True)]
            cut = {
                key: statistics.mean(100 * (1 - body["finetuned"][key] / body["dense"][key]) for body in bodies)
                for key in ("thop", "params")
            }
            cells = (*map(_told, top1.values()), _told(drops), f"-{cut['thop']:.2f} %", f"-{cut['params']:.2f} %")
            lines.append(f"| {row.threshold} | {paper} | {len(bodies)} | {' | '.join(cells)} |")
        return "\n".join(lines)


def _told(values: list[float]) -> str:
    """The mean, and the deviation between seeds where there are several."""
    spread = f" (sd {statistics.stdev(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def is_over(run: Path) -> bool:
    return (run / "report.json").is_file()


def start_of(seed: Path) -> Path:
    """The file of the dense weights that a seed's rows begin with: float16 where they would fill the state."""
    whole, half = seed / "dense/dense.safetensors", seed / "half.safetensors"
    if not half.is_file() and whole.is_file() and whole.stat().st_size > LARGE:
        tensors, meta = tensor_files.read_tensors(whole)
        tensor_files.save_tensors(half, {k: t.half() if t.dim() > 1 else t for k, t in tensors.items()}, meta)
    return half if half.is_file() else whole


def unpack(state: Path, folder: Path) -> None:
    parts = sorted(state.glob("part_*"), key=lambda part: int(part.name.removeprefix("part_")))
    if parts:
        with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as tar:
            tar.extractall(folder, filter="data")


def wanted(folder: Path) -> list[list[Path]]:
    """What a later start needs, most needed first; files of one list go together.

    Ledgers and reports of all runs; the weights that rows begin with; artifacts of runs in progress; their newest
    checkpoints; then, for later use, the weights of what is finished.
    """
    small: list[Path] = []
    starts: list[list[Path]] = []
    artifacts: list[list[Path]] = []
    checkpoints: list[list[Path]] = []
    results: list[list[Path]] = []
    for seed in sorted(path for path in folder.iterdir() if path.is_dir()):
        trained = is_over(seed / "dense")
        left = not trained or sum(is_over(run) for run in seed.glob("t*")) < ROWS
        if trained and start_of(seed).is_file():  # of a seed that is over it may have been left out
            (starts if left else results).append([start_of(seed)])
        for run in sorted(path for path in seed.iterdir() if path.is_dir()):
            files = [file for file in sorted(run.rglob("*")) if file.is_file() and file.suffix in KEPT]
            files = [file for file in files if not NOT_KEPT & set(file.relative_to(run).parts)]
            weights = [file for file in files if file.suffix in (".safetensors", ".sha256")]
            small += [file for file in files if file not in weights]
            if is_over(run):
                results += [[file] for file in weights if file.name == "finetuned.safetensors" and run.name != "dense"]
                continue
            # a row's dense network is what it began with
            weights = [file for file in weights if run.name == "dense" or file != run / "dense.safetensors"]
            saved = [file for file in weights if file.parent.name.endswith("_checkpoints")]
            artifacts += [[file] for file in weights if file not in saved]
            newest = max((file for file in saved if file.suffix == ".safetensors"), default=None)
            if newest is not None:
                checkpoints.append([file for file in saved if file.stem == newest.stem])  # with its proof
    return [small, *starts, *artifacts, *checkpoints, *results]


def pack(state: Path, folder: Path) -> None:
    """Write what a later start needs, as far as it fits: no exports, no TensorBoard."""
    room, buffer, out = LIMIT, io.BytesIO(), 0
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for files in wanted(folder):
            size = sum(file.stat().st_size + 2048 for file in files)
            if size > room:
                out += size
                continue
            room -= size
            for file in files:
                tar.add(file, file.relative_to(folder))
    body = buffer.getvalue()
    state.mkdir(parents=True, exist_ok=True)
    for part in state.glob("part_*"):
        part.unlink()
    for number, start in enumerate(range(0, len(body), PART)):
        (state / f"part_{number}").write_bytes(body[start : start + PART])
    more = f"; {out / 2**20:.1f} MiB did not fit: what is unfinished of that starts again" if out else ""
    print(f"state: {state}, {len(body) / 2**20:.1f} MiB{more}", flush=True)


def costs(study: Study, rate: float) -> dict[str, Any]:
    """Images that go through training, and the minutes at a rate in images per second."""
    images, (train, tune) = study.given.images or 50_000, study.epochs()
    seen = study.given.seeds * images * (train + len(study.case.rows) * tune)
    return {"images": seen, "images_per_s": rate, "minutes": round(seen / rate / 60, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=CASES)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=1, help="how many, as far as the time goes")
    parser.add_argument("--images", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--compile", default="reduce-overhead", help="false, true, reduce-overhead, max-autotune")
    parser.add_argument("--check", type=float, metavar="IMAGES_PER_S", help="print the cost at such a rate, and end")
    given = parser.parse_args()
    # one place on every machine: a run that goes on names the same dense network; a dry run has another
    dry = f"_dry_{given.images}_{given.epochs}" if given.images or given.epochs else ""
    folder = Path(tempfile.gettempdir(), f"gpu_papers_{given.network}{dry}")
    study = Study(given.network, given, folder)
    if given.check:
        print(json.dumps(costs(study, given.check)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the state is written on the way out
    folder.mkdir(exist_ok=True)
    state = given.state or Path(f"gpu_papers_{given.network}{dry}_state")
    unpack(state, folder)
    try:
        study.all_runs(lambda: pack(state, folder))
    finally:
        pack(state, folder)
    facts = describe_environment(DistributedEnvironment.single_process())
    commit = commit_of(ROOT / "README.md") or os.environ.get("DIST_PRUNE_COMMIT")
    print(f"\n{given.network}, seeds from {given.seed}, {facts['gpu'] or facts['processor']}, torch "
          f"{facts['packages']['torch']}, commit {commit}\n\n{study.table()}")  # fmt: skip


if __name__ == "__main__":
    main()

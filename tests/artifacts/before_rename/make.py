"""Make the artifacts of this folder with the code of the checkout that this file lies in; see README.md.

    python tests/artifacts/before_rename/make.py

Runs are started as a user starts them. Those that have to be unfinished get a SIGTERM as soon as a file of the
interrupted stage is on the disk.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
RECIPE = ("--recipe", str(HERE / "small.yaml"))
TINY = ("backbone.name=resnet10t", "backbone.kwargs={layers: [1,1,1,1], channels: [4,4,8,8], stem_width: 8}")
ROUNDS = (
    *TINY, "schedule.rounds=2", "schedule.carry_optimizer=true", "schedule.finetune_epochs=1",
    "score.images=30", "score.micro_batch=1", "score.save_every=3",
)  # fmt: skip
TRAINING = (*TINY, "train.epochs=8", "train.save_every_steps=3", "train.keep_checkpoints=1")
ENTROPY = (*TINY, "method.name=entropy", "method.parallel=batches", "method.batch=4", "score.images=8")
SHAPLEY = (*TINY, "method.name=shapley", "method.samples=60", "train.holdout=0.2")
LEFT_OUT = (".lock", "report.html", "errors", "tensorboard", "*.tmp")


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "dist_prune/run.py"), *words, "--run-dir", str(folder)]
    return subprocess.Popen(command, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(folder: Path, *words: str) -> None:
    code = start(folder, *words).wait()
    assert code == 0, f"exit code {code} of {words}"


def stop(folder: Path, pattern: str, *words: str) -> None:
    process = start(folder, *words)
    while not any(folder.glob(pattern)):
        assert process.poll() is None, f"it was over before there was any {pattern}"
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75, f"it did not stop inside what writes {pattern}"


def keep(folder: Path, name: str) -> None:
    shutil.rmtree(HERE / name, ignore_errors=True)
    shutil.copytree(folder, HERE / name, ignore=shutil.ignore_patterns(*LEFT_OUT))


def plan_of(folder: Path) -> str:
    return json.loads((folder / "report.json").read_text())["plan"]["fingerprint"]


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import dist_prune

    expected: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        finish(work / "finished", *RECIPE, "score.many=[l1, hrank]")
        keep(work / "finished", "finished")
        expected["finished"] = plan_of(work / "finished")
        images = torch.arange(2 * 16 * 16, dtype=torch.float32).reshape(2, 1, 16, 16) / 512
        expected["outputs"] = dist_prune.load(work / "finished/export")(images).tolist()

        dense = ("train.epochs=0", f"backbone.checkpoint={work / 'finished/dense.safetensors'}")
        finish(work / "from", *RECIPE, *dense, f"score.from={work / 'finished'}", "target.macs=0.4")
        expected["score.from"] = plan_of(work / "from")

        for name, pattern, words in (
            ("rounds", "round_2/partial/observation_*.safetensors", ROUNDS),
            ("training", "train_checkpoints/*.sha256", TRAINING),
            ("entropy", "round_1/partial/kept_*.safetensors", ENTROPY),
            ("shapley", "round_1/measured.jsonl", SHAPLEY),
        ):
            stop(work / name, pattern, *RECIPE, *words)
            keep(work / name, name)
            finish(work / name, *RECIPE, *words)
            expected[name] = plan_of(work / name)

        sweep = ("--sweep", str(HERE / "tasks.yaml"), "--task")
        finish(work / "sweep/0", *sweep, "0")
        keep(work / "sweep/shared", "shared")
        finish(work / "sweep/1", *sweep, "1")
        expected["sweep"] = plan_of(work / "sweep/1")
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()

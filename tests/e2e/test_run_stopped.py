"""Whole runs that are killed, asked to stop, or lose a rank: the next start goes on, and the end is the same."""

import json
import os
import random
import signal
import subprocess
import time

import psutil
import pytest
import torch

from dist_prune import models
from dist_prune.distributed import tensor_files
from dist_prune.pipeline.ledger import Ledger
from tests.support.launch import PYTHON, ROOT, SMALL, TORCHRUN, environment, plugin, report, run, start, wait_for


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Weights to begin with, so that no run here trains the dense network first."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    tensor_files.save_tensors(file, models.create("resnet8p_cifar", 10, 1, kwargs={"img_size": 8}).state_dict())
    return file


@pytest.mark.slow
def test_killed_while_scoring_and_while_training_then_run_again(dense, tmp_path):
    """SIGKILL in the middle of both; the plan is the one of an uninterrupted run from the same dense weights."""
    words = (
        *SMALL, f"backbone.checkpoint={dense}", "train.epochs=0", "score.images=700", "score.micro_batch=2",
        "score.save_every=5", "finetune.epochs=5",
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    outputs: list[str] = []
    code, output = run(PYTHON, whole, *words)
    assert code == 0, output
    for file in ("round_1/partial/observation_1.safetensors", "finetune_checkpoints/*.sha256"):
        process = start(PYTHON, cut, *words)
        wait_for(process, lambda file=file: any(cut.glob(file)))
        os.kill(process.pid, signal.SIGKILL)
        outputs.append(process.communicate()[0])
        assert process.returncode == -signal.SIGKILL, f"it was not killed while {file} was there"
    code, output = run(PYTHON, cut, *words)
    assert code == 0, output
    assert "score: resumes after" in outputs[1]
    assert "resumes after epoch" in output
    one, two = report(whole), report(cut)
    assert one["plan"]["fingerprint"] == two["plan"]["fingerprint"]
    assert one["finetuned"]["loss"] == two["finetuned"]["loss"], "the resumed training ends at the same weights"


@pytest.mark.parametrize("number", [pytest.param(signal.SIGUSR1, marks=pytest.mark.slow), signal.SIGTERM])
def test_asked_to_stop_it_saves_and_says_so(dense, tmp_path, number):
    """In scoring, then in training; exit code 75 each time, and the end is the one of an uninterrupted run."""
    words = (
        *SMALL, f"backbone.checkpoint={dense}", "train.epochs=0", "score.images=700", "score.micro_batch=2",
        "score.save_every=7", "finetune.epochs=3", "finetune.ema=0.9", "finetune.mixup=0.2", "finetune.batch=32",
        "finetune.save_every_steps=3",
    )  # fmt: skip
    folder, said = tmp_path / "run", []
    for file in (folder / "round_1/partial/observation_1.safetensors", folder / "finetune_checkpoints"):
        process = start(PYTHON, folder, *words)
        wait_for(process, file.exists)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 75, output
        said.append(output)
    name = signal.Signals(number).name
    assert f"stopped by {name} while scoring" in said[0]
    assert f"stopped by {name} in " in said[1]
    code, output = run(PYTHON, folder, *words)
    assert code == 0, output
    assert "finetune: resumes after epoch" in output
    code, output = run(PYTHON, tmp_path / "whole", *words)
    assert code == 0, output
    one, two = report(tmp_path / "whole"), report(folder)
    assert one["plan"]["fingerprint"] == two["plan"]["fingerprint"]
    assert one["finetuned"]["loss"] == two["finetuned"]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [PYTHON, TORCHRUN], ids=["1 rank", "2 ranks"])
def test_killed_at_random_steps(dense, tmp_path, launcher):
    """SIGKILL of all its processes, twice at random places of the training: the same weights, bit for bit."""
    words = (
        *SMALL, f"backbone.checkpoint={dense}", "train.epochs=0", "finetune.epochs=8", "finetune.ema=0.9",
        "finetune.mixup=0.2", "data.augment=crop", "finetune.batch=32", "finetune.save_every_steps=2",
    )  # fmt: skip
    whole, cut, rng = tmp_path / "whole", tmp_path / "cut", random.Random(0)
    code, output = run(launcher, whole, *words)
    assert code == 0, output
    for number in range(2):
        process, before = start(launcher, cut, *words), set(cut.glob("finetune_checkpoints/*.sha256"))
        # it has gone on and saved anew: behind that, somewhere
        wait_for(process, lambda before=before: set(cut.glob("finetune_checkpoints/*.sha256")) - before)
        time.sleep(rng.random() / 2)
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            child.kill()
        process.communicate()
        assert not (cut / "finetuned.safetensors").exists(), f"the training was over before kill {number + 1}"
    code, output = run(launcher, cut, *words)
    assert code == 0, output
    assert "finetune: resumes after epoch" in output
    ends = [Ledger(folder).last("finetune") for folder in (whole, cut)]
    assert ends[0] is not None and ends[1] is not None
    assert ends[0]["outputs"] == ends[1]["outputs"]


@pytest.mark.slow
def test_two_real_ranks_train_as_one(tmp_path):
    """Gradients are averaged over ranks: without batch statistics, 2 ranks end where 1 does, up to rounding."""
    sums = []
    for launcher in (PYTHON[:1], TORCHRUN[:-1]):
        done = subprocess.run(
            [*launcher, str(ROOT / "tests/support/train_once.py")], env=environment(PYTHONPATH=str(ROOT)), cwd=ROOT,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        sums.append(json.loads(done.stdout.splitlines()[-1]))
    assert sums[0]["world"] == 1
    assert sums[1]["world"] == 2
    assert sums[1]["digest"] == pytest.approx(sums[0]["digest"], rel=1e-9, abs=1e-9)
    assert not sums[0]["counted"]
    assert sums[1]["seen"]["gradients"] == sums[1]["counted"]["gradients"] > 0, "DDP's own buckets against the account"
    assert sums[1]["seen"]["buffers"] == sums[1]["counted"]["buffers"] > 0


DYING = """
import os, signal, time
from dist_prune.methods import base
from dist_prune.pruning.hooks.statistics import State, Statistic
class Count(Statistic):
    def states(self, site):
        return {"n": State("sum")}
    def update(self, site, tables, maps, ids, grads):
        if 15 in ids.tolist():
            time.sleep(1)
            {ACT}
        tables["n"] += len(maps)
class Foreign(base.Method):
    paper = "a method that fails at one image, on whichever rank that image is"
    def score(self, bench):
        bench.collect(bench.hook_points, Count())
        return {}
    def select(self, scores, channels, request):
        raise AssertionError
"""


@pytest.mark.parametrize(
    ("act", "said"),
    [
        pytest.param(
            "raise RuntimeError('image 15 is strange')",
            "rank 1 stopped with: RuntimeError: image 15 is strange",
            marks=pytest.mark.slow,
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    ],
    ids=["raises", "killed"],
)
def test_a_rank_that_dies_ends_the_others(tmp_path, act, said):
    place = plugin(tmp_path, "dying", DYING.replace("{ACT}", act))
    began = time.monotonic()
    code, output = run(TORCHRUN, tmp_path / "run", *SMALL, "train.epochs=1", "method.name=dying", PYTHONPATH=place)
    assert code != 0
    assert said in output, output[-3000:]
    assert time.monotonic() - began < 90

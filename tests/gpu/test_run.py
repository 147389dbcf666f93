"""Whole runs on a GPU through the launchers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dist_prune
from tests.support import tiny

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


def run(*words: str, config: str = "gpu_1.yaml", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(ROOT / "launch" / config), str(ROOT / "dist_prune/run.py"), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def finished(gpu, tmp_path_factory) -> Path:
    """The quickstart on one GPU."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    found = run("--recipe", "quickstart", "--run-dir", str(folder))
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    return folder


def test_the_quickstart_runs_on_one_gpu(finished, gpu):
    report = json.loads((finished / "report.json").read_text())
    assert report["environment"]["device"].startswith(gpu.type)
    assert min(report["dense"]["top1"], report["finetuned"]["top1"]) > 95


def test_a_cpu_scores_the_same_weights_to_the_same_plan(finished, tmp_path):
    """The dense network that the GPU trained, scored on the CPU of the same machine."""
    words = ["--recipe", "quickstart", "--run-dir", str(tmp_path / "cpu"), "finetune.epochs=0", "train.epochs=0"]
    found = run(*words, f"backbone.checkpoint={finished / 'dense.safetensors'}", config="cpu_2.yaml",
                CUDA_VISIBLE_DEVICES="")  # fmt: skip
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    plans = [json.loads((folder / "round_1/plan.json").read_text()) for folder in (finished, tmp_path / "cpu")]
    assert plans[0]["removed"] == plans[1]["removed"]


def test_the_bundle_loads_and_moves(finished, gpu):
    model = dist_prune.load(finished / "export")
    x = tiny.example().float()
    there = model.to(gpu)(x.to(gpu)).cpu()
    assert torch.allclose(there, dist_prune.load(finished / "export")(x), atol=1e-4)


def test_out_of_memory_names_the_key_to_lower(card, tmp_path):
    code = (
        "import sys, torch; torch.cuda.set_per_process_memory_fraction(1e-4); from dist_prune import run; "
        f"sys.exit(run.main(['--recipe', 'quickstart', '--run-dir', {str(tmp_path / 'run')!r}]))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2, found.stdout[-2000:] + found.stderr[-2000:]
    assert "train.batch" in found.stderr

"""The commands that wait for a GPU: they run here on next to no images, so that they run there at the first try."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=environment)


def test_what_the_papers_cost():
    found = run("benchmarks/gpu_papers.py", "resnet56p", "--check", "20000")
    assert json.loads(found.stdout) == {"images": 20_500_000, "images_per_s": 20_000.0, "minutes": 17.1}


def test_without_a_gpu_it_says_so():
    found = run("benchmarks/gpu.py")
    assert found.returncode == 1
    assert "--device cpu" in found.stderr


@pytest.mark.slow
def test_parts_are_resumed_and_told(tmp_path):
    file = tmp_path / "gpu.json"
    words = (
        "benchmarks/gpu.py",
        "--device",
        "cpu",
        "--only",
        "training,solvers",
        "--minutes",
        "2",
        "--json",
        str(file),
    )
    first = run(*words)
    assert first.returncode == 0, first.stderr[-2000:]
    body = json.loads(file.read_text())
    assert all(part["finished"] for part in body["parts"].values())
    rows = [row for part in body["parts"].values() for row in part["rows"]]
    assert not [row for row in rows if "failed" in row]
    assert all(row["ratio"] > 0 for row in rows)
    again = run(*words)
    assert again.stdout.count("measured before, skipped") == 2
    assert "| train resnet56p_cifar" in again.stdout


@pytest.mark.slow
def test_a_papers_state_is_carried_in_parts(tmp_path):
    code = f"""
import os, pathlib, sys
sys.path.insert(0, "benchmarks")
import gpu_papers as papers
folder, state, other = (pathlib.Path({str(tmp_path)!r}, name) for name in ("runs", "state", "other"))
(folder / "dense").mkdir(parents=True), (folder / "t0.7").mkdir(), other.mkdir()
body = os.urandom(17 * 2**20)
(folder / "dense/dense.safetensors").write_bytes(body)
(folder / "t0.7/report.json").write_text("{{}}"), (folder / "t0.7/finetuned.safetensors").write_bytes(b"1")
papers.pack(state, folder), papers.unpack(state, other)
assert (other / "dense/dense.safetensors").read_bytes() == body
assert sorted(p.name for p in (other / "t0.7").iterdir()) == ["report.json"]
assert max(part.stat().st_size for part in state.iterdir()) <= 15 * 2**20
"""
    found = run("-c", code)
    assert found.returncode == 0, found.stderr

"""The commands that wait for a GPU: they run here on next to no images, so that they run there at the first try."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import gpu, gpu_papers
from benchmarks.gpu_parts import common
from dist_prune.distributed import tensor_files

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=environment)


def test_what_the_papers_cost(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_papers.py", "resnet56p", "--check", "20000"])
    gpu_papers.main()
    assert json.loads(capsys.readouterr().out) == {"images": 20_500_000, "images_per_s": 20_000.0, "minutes": 17.1}


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu"):
        gpu.main()


def part(rows):
    """A part of benchmarks/gpu.py that would give these rows, and counts how often each is measured."""
    counts: Counter[str] = Counter()

    def measured(device, seconds, done):
        for row in rows:
            if row["what"] not in done:
                counts[row["what"]] += 1
                yield row

    return SimpleNamespace(rows=measured, counts=counts)


def test_a_part_goes_on_behind_its_last_figure(tmp_path, monkeypatch):
    """Its time is over after one row, then after another; what failed is measured again where that is asked for."""
    fake = part([{"what": "a"}, {"what": "b", "failed": "more than 3 s"}, {"what": "c", "ratio": 1.5}])
    monkeypatch.setitem(sys.modules, "benchmarks.gpu_parts.fake", fake)
    body = {"parts": {}, "machine": {"commit": "abc"}}
    given = SimpleNamespace(json=tmp_path / "gpu.json", device="cpu", again=False)
    for seconds, finished in ((0, False), (9, True), (9, True)):
        gpu.measure("fake", given, body, seconds)
        assert body["parts"]["fake"]["finished"] is finished
    assert fake.counts == {"a": 1, "b": 1, "c": 1}
    gpu.measure("fake", SimpleNamespace(**vars(given) | {"again": True}), body, 9)
    assert fake.counts == {"a": 1, "b": 2, "c": 1}
    assert json.loads(given.json.read_text()) == body
    assert "| c |  |  |  | 1.5 |  |  |  |" in gpu.markdown(body)


def test_a_part_whose_packages_are_missing_says_so_and_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "benchmarks.gpu_parts.fake", None)  # as an import that fails
    body = {"parts": {}, "machine": {"commit": "abc"}}
    gpu.measure("fake", SimpleNamespace(json=tmp_path / "gpu.json", device="cpu", again=False), body, 9)
    assert not body["parts"]["fake"]["finished"]
    assert "dist_prune.cli.main doctor" in body["parts"]["fake"]["rows"][0]["missing"]
    assert "| fake |" in gpu.markdown(body)


def test_figures_of_two_machines_do_not_go_into_one_file(tmp_path):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"parts": {}, "machine": {"device": "cuda", "gpu": "A"}}))
    with pytest.raises(SystemExit, match="holds figures of gpu A, this is B"):
        gpu.earlier(file, {"device": "cuda", "gpu": "B"})


def test_a_row_that_takes_too_long_is_told():
    def rows():
        yield {"what": "quick"}
        time.sleep(60)

    found = list(common.within(rows(), "slow", 1))
    assert found == [{"what": "quick"}, {"what": "slow", "failed": "more than 1 s"}]


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
        "6",
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
@pytest.mark.parametrize(("names", "minutes"), [("scoring", 1), ("deployment,loading", 6)])
def test_the_other_parts_end_where_there_is_no_gpu(names, minutes, tmp_path):
    """What is not over in time says so; nothing fails for another reason."""
    file = tmp_path / "gpu.json"
    words = ("--device", "cpu", "--only", names, "--minutes", str(minutes), "--json", str(file))
    found = run("benchmarks/gpu.py", *words)
    assert found.returncode == 0, found.stderr[-2000:]
    parts = json.loads(file.read_text())["parts"]
    assert all(any("images_per_s" in row for row in part["rows"]) for part in parts.values())
    failed = [row for part in parts.values() for row in part["rows"] if "failed" in row]
    assert not [row for row in failed if not row["failed"].startswith("more than")]
    assert "deployment" not in parts or [row for row in parts["deployment"]["rows"] if "measured_share" in row]


@pytest.fixture
def small(tmp_path):
    """CIFAR-10 of 512 and 64 images."""
    rng = np.random.default_rng(0)
    tables = {}
    for split, count in (("train", 512), ("test", 64)):
        tables |= {
            f"x_{split}": rng.integers(0, 256, (count, 32, 32, 3), np.uint8),
            f"y_{split}": np.arange(count) % 10,
        }
    np.savez(tmp_path / "cifar10.npz", **tables)
    return tmp_path


@pytest.mark.slow
def test_a_papers_network_from_scratch_to_its_table(small):
    """The dry run: 512 images, one epoch."""
    (small / "temporary").mkdir()
    more = {"DIST_PRUNE_DATA": str(small), "TMPDIR": str(small / "temporary")}
    words = (
        "benchmarks/gpu_papers.py",
        "resnet56p",
        "--images",
        "512",
        "--epochs",
        "1",
        "--state",
        str(small / "state"),
    )
    found = run(*words, **more)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    lines = [line for line in found.stdout.splitlines() if line.startswith("| 0.")]
    assert [line.split("|")[3].strip() for line in lines] == ["1", "1", "1"], "a seed in each row"
    shutil.rmtree(small / "temporary")
    (small / "temporary").mkdir()
    again = run(*words, **more)
    assert [line for line in again.stdout.splitlines() if line.startswith("| 0.")] == lines
    assert "score:" not in again.stdout, "another machine makes nothing again"


def write(place, **files):
    place.mkdir(parents=True)
    for name, body in files.items():
        file = place / name.replace("__", "/")
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(body)


def test_a_papers_state_is_carried_in_parts(tmp_path, monkeypatch):
    """The weights that rows begin with, and of a row in progress the newest checkpoint; no more than the limit."""
    monkeypatch.setattr(gpu_papers, "LIMIT", 4 << 20)
    monkeypatch.setattr(gpu_papers, "PART", 1 << 20)
    folder, state, other = (tmp_path / name for name in ("runs", "state", "other"))
    body = np.random.default_rng(0).bytes(1 << 20)
    write(folder / "0/dense", **{"dense.safetensors": body, "report.json": b"{}", "finetuned.safetensors": body})
    write(folder / "0/t0.75", **{"report.json": b"{}", "finetuned.safetensors": b"1", "export__x.safetensors": b"2"})
    saved = {f"finetune_checkpoints__step_{n}-a{end}": body for n in (1, 2) for end in (".safetensors", ".sha256")}
    row = {"ledger.jsonl": b"{}", "dense.safetensors": body, "round_1__scores.safetensors": b"3"}
    write(folder / "0/t0.7", **row, **saved)

    def carried() -> list[str]:
        gpu_papers.pack(state, folder)
        shutil.rmtree(other, ignore_errors=True)
        other.mkdir()
        gpu_papers.unpack(state, other)
        return sorted(str(file.relative_to(other / "0")) for file in other.rglob("*") if file.is_file())

    newest, proof = (f"t0.7/finetune_checkpoints/step_2-a{end}" for end in (".safetensors", ".sha256"))
    rest = ["t0.7/ledger.jsonl", "t0.7/round_1/scores.safetensors", "t0.75/finetuned.safetensors", "t0.75/report.json"]
    assert carried() == ["dense/dense.safetensors", "dense/report.json", newest, proof, *rest]
    assert (other / "0/dense/dense.safetensors").read_bytes() == body
    assert max(part.stat().st_size for part in state.iterdir()) <= 1 << 20
    # a training whose checkpoint does not fit starts again; the rest is there
    (folder / "0" / newest).write_bytes(2 * body)
    assert carried() == ["dense/dense.safetensors", "dense/report.json", *rest]


def test_large_dense_weights_are_carried_as_float16(tmp_path, monkeypatch):
    """VGG-16 in float32 would be more than the state may be."""
    monkeypatch.setattr(gpu_papers, "LARGE", 1000)
    weights = {"conv.weight": torch.randn(26, 26), "norm.weight": torch.randn(9)}
    (tmp_path / "dense").mkdir()
    tensor_files.save_tensors(tmp_path / "dense/dense.safetensors", weights)
    found, _ = tensor_files.read_tensors(gpu_papers.start_of(tmp_path))
    assert found["conv.weight"].dtype == torch.float16 and torch.equal(found["norm.weight"], weights["norm.weight"])


def test_the_table_has_the_mean_of_the_seeds_that_finished(tmp_path):
    for seed, top1 in enumerate((93.0, 92.0)):
        figures = {"top1": top1, "thop": 50, "params": 80}
        report = {"dense": {"top1": 94, "thop": 100, "params": 100}, "pruned": figures, "finetuned": figures}
        (tmp_path / f"{seed}/t0.7").mkdir(parents=True)
        (tmp_path / f"{seed}/t0.7/report.json").write_text(json.dumps(report))
    study = gpu_papers.Study("resnet56p", SimpleNamespace(minutes=1), tmp_path)
    lines = study.table().splitlines()
    assert (
        "| 2 | 94.00 (sd 0.00) | 92.50 (sd 0.71) | 92.50 (sd 0.71) | 1.50 (sd 0.71) | -50.00 % | -20.00 % |" in lines[3]
    )
    assert "not run" in lines[2] and "not run" in lines[4]

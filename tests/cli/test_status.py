"""``dist-prune status``, ``run``, ``sweep --run``, ``completion``, ``list recipes``: as a person types them."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_prune.cli.main import main
from dist_prune.cli.status import describe, run_directories
from dist_prune.config.recipe_files import header, known_recipes
from dist_prune.fileio import seal
from tests.support.launch import ROOT, environment


def run_folder(folder: Path, stages: list[str], started: str = "", error: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: x\n")
    (folder / ".lock").touch()
    lines = [seal({"stage": stage, "fingerprint": "f", "outputs": {}}) for stage in stages]
    (folder / "ledger.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if started:
        (folder / "stage_started.json").write_text(json.dumps({"stage": started}))
    if error:
        (folder / "errors").mkdir()
        (folder / "errors/rank_0.json").write_text(json.dumps({"rank": 0, "code": 1, "error": error}))
    return folder


def test_runs_are_listed_with_their_states(tmp_path, capsys):
    run_folder(tmp_path / "a/done", ["train", "score", "report"], "export")
    run_folder(tmp_path / "a/cut_off", ["train"], "score")
    run_folder(tmp_path / "b", ["train"], "score", "several lines\nValueError: the last one")
    busy = run_folder(tmp_path / "c", [], "train")
    (tmp_path / "no_run").mkdir()
    assert [folder.name for folder in run_directories(tmp_path)] == ["cut_off", "done", "b", "c"]
    with (busy / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["status", str(tmp_path), "--json"]) == 0
        found = {Path(one["run"]).name: one for one in json.loads(capsys.readouterr().out)}
    assert {name: (one["state"], one["stage"], one["done"]) for name, one in found.items()} == {
        "c": ("running", "train", 0),
        "b": ("failed", "score", 1),
        "cut_off": ("stopped", "score", 1),
        "done": ("finished", "report", 3),
    }
    assert list(found) == ["c", "b", "cut_off", "done"]
    assert main(["status", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "ValueError: the last one" in text and "several lines" not in text
    assert describe(busy)["state"] == "stopped"
    assert main(["status", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_what_a_running_one_is_at_and_how_long_it_will_take(tmp_path, capsys):
    busy = run_folder(tmp_path / "c", ["train"], "score")
    note = {"what": "score taylor", "done": 3, "total": 40, "seconds_left": 200.0, "at": time.time() + 5}
    with (busy / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert (describe(busy)["work"], describe(busy)["seconds_left"]) == ("", None)
        (busy / "progress.json").write_text(json.dumps(note))
        found = describe(busy)
        assert found["work"] == "score taylor 3/40" and 190 < found["seconds_left"] < 206
        assert main(["status", str(tmp_path)]) == 0
        assert re.search(r"score +1 +score taylor 3/40 +3 min 2\d s", capsys.readouterr().out)
        for wrong in (note | {"at": 1.0}, note | {"seconds_left": "soon"}, {"at": time.time() + 5}, []):
            (busy / "progress.json").write_text(json.dumps(wrong))
            assert (describe(busy)["work"], describe(busy)["seconds_left"]) == ("", None)
    (busy / "progress.json").write_text(json.dumps(note))
    assert describe(busy)["work"] == "", "nothing runs"


def test_recipes_are_listed_with_a_sentence(capsys):
    for name, file in known_recipes().items():
        assert {"title", "paper", "cost"} <= header(file).keys(), name
    assert main(["list", "recipes", "resnet5*_graph"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[:1].strip()][:2] == ["resnet50_graph", "resnet56_cifar10_graph"]
    assert [line.split()[0] for line in lines[1:4]] == ["paper", "data", "cost"] and "imagenet" in lines[2]
    assert main(["list", "recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for label in ("paper", "cost"):
        assert sum(line.startswith(f"    {label}") for line in lines) == len(known_recipes()), "of every recipe"
    assert not [line for line in lines if line.endswith("...")], "a pipe gets whole sentences"
    assert main(["list", "recipes", "resnet50_graph"]) == 0
    text = capsys.readouterr().out
    assert "needs     DIST_PRUNE_DATA/imagenet" in text and "-48.81 %" in text
    assert main(["list", "recipes", "resnet50_graph", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)["resnet50_graph"]
    assert body["file"].endswith("resnet50_graph.yaml") and body["cost"].startswith("100 images of scoring")


@pytest.mark.parametrize("columns", [60, 110])
def test_a_terminal_gets_wrapped_lines(monkeypatch, capsys, columns):
    """Nothing is left out, and nothing runs over the edge; the labels of one recipe stand below one another."""
    assert main(["list", "recipes"]) == 0
    piped = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["list", "recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= columns
    assert " ".join("\n".join(lines).split()) == " ".join(piped.split())
    first = lines[0]
    assert (first == "convnext_tiny_isomorphic") == (columns == 60)


def test_a_shell_completes_verbs_options_and_recipes(capsys):
    assert main(["completion", "fish"]) == 0
    assert "__fish_seen_subcommand_from latency" in capsys.readouterr().out
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")

    def complete(*words: str) -> list[str]:
        typed = " ".join(f"'{word}'" for word in ("dist-prune", *words))
        code = f"{script}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words)}; _dist_prune; echo ${{COMPREPLY[@]}}"
        done = subprocess.run([bash, "-c", code], capture_output=True, text=True, cwd="/", check=True)
        return done.stdout.split()

    assert complete("sta") == ["status"] and "ps" in complete("p")
    assert complete("check", "quick") == ["quickstart"]
    assert complete("sweep", "--dry") == ["--dry-run"]


@pytest.mark.slow
def test_a_sweep_runs_here_and_goes_on(tmp_path):
    """Two tasks at a time, one of which is refused; the second start runs nothing again."""
    quick = {
        "train.epochs": 1, "finetune.epochs": 0, "data.workers": 0, "report.latency_repeats": 1, "target.tolerance": 1,
        "finetune.warmup_epochs": 0,
    }  # fmt: skip
    tasks = [{**quick, "seed": 0}, {**quick, "seed": 1}, {**quick, "backbone.checkpoint": "/none.pt"}]
    file = tmp_path / "three.yaml"
    file.write_text(json.dumps({"tasks": [{"base": "quickstart", "list": tasks}]}))

    def sweep(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dist_prune", "sweep", str(file), *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )

    first = sweep("--run", "--jobs", "2", "--json")
    assert first.returncode == 1, first.stderr
    body = json.loads(first.stdout)
    assert [entry["state"].split(",")[0] for entry in body] == ["finished", "finished", "refused"], first.stderr
    assert "3/3" in first.stderr
    assert "none.pt" in (tmp_path / body[2]["run"] / "sweep.log").read_text()
    state = sweep("--dry-run")
    assert "1 of 3 would be run or resumed" in state.stdout
    assert re.search(r"took \d+ s and \d+\.\d MiB here \(mean of 2\): the others about \d+ s with", state.stdout)
    ledger = (tmp_path / body[0]["run"] / "ledger.jsonl").read_text()
    again = sweep("--run", "--json")
    assert json.loads(again.stdout)[0]["state"].startswith("finished")
    lines = (tmp_path / body[0]["run"] / "ledger.jsonl").read_text()[len(ledger) :].splitlines()
    assert {json.loads(line)["stage"] for line in lines} <= {"report"}


@pytest.mark.slow
def test_run_is_run_py(tmp_path):
    words = ["quickstart", "train.epochs=1", "finetune.epochs=0", "data.workers=0", "target.tolerance=1"]
    command = [sys.executable, "-m", "dist_prune", "run", *words, "--run-dir", str(tmp_path / "out"), "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/report.json").read_text())["recipe"]["seed"] == 3
    assert describe(tmp_path / "out")["state"] == "finished"


def test_a_dry_run_measures_on_finished_tasks(tmp_path, monkeypatch, capsys):
    """Two of four tasks took 40 s and 80 s and 1 MiB each; nothing is said of a sweep without a finished task."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "four.yaml").write_text(json.dumps({"tasks": [{"base": "quickstart", "grid": {"seed": [0, 1, 2, 3]}}]}))
    assert main(["sweep", "four.yaml", "--dry-run"]) == 0
    assert "not known before one task is finished" in capsys.readouterr().out
    for seed, seconds in ((0, 40), (1, 80)):
        folder = tmp_path / "runs" / "four" / f"quickstart-seed_{seed}"
        folder.mkdir(parents=True)
        lines = [("train", 1000.0), ("train", 0.75 * seconds), ("report", 0.25 * seconds)]  # the first one is of before
        text = "".join(seal({"stage": stage, "seconds": took}) + "\n" for stage, took in lines)
        (folder / "ledger.jsonl").write_text(text)
        (folder / "weights").write_bytes(bytes(2**20 - (folder / "ledger.jsonl").stat().st_size))
    assert main(["sweep", "four.yaml", "--dry-run", "--jobs", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 of 4 would be run or resumed" in said
    assert (
        "a finished task took 1 min 0 s and 1.0 MiB here (mean of 2): the others about 1 min 0 s with --jobs 2" in said
    )
    assert " and 2 MiB of " in said and "no task of" not in said


def test_a_dry_run_measures_each_recipe_by_itself(tmp_path, monkeypatch, capsys):
    """A task took 40 s of one recipe and 100 s of another; a third one is taken for their mean."""
    monkeypatch.chdir(tmp_path)
    tasks = [
        {"base": base, "grid": {"seed": list(range(count))}}
        for base, count in (("quickstart", 3), ("resnet20_search", 2), ("resnet18_folder", 1))
    ]
    (tmp_path / "mixed.yaml").write_text(json.dumps({"tasks": tasks}))
    for name, seconds in (("quickstart-seed_0", 40), ("resnet20_search-seed_0", 100)):
        folder = tmp_path / "runs/mixed" / name
        folder.mkdir(parents=True)
        (folder / "ledger.jsonl").write_text(seal({"stage": "report", "seconds": seconds}) + "\n")
    assert main(["sweep", "mixed.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 of 6 would be run" in said and "the others about 4 min 10 s with --jobs 1" in said  # 40 + 40 + 100 + 70
    assert "no task of resnet18_folder is finished yet" in said
    assert main(["sweep", "mixed.yaml", "--dry-run", "--jobs", "2"]) == 0
    assert "the others about 2 min 20 s with --jobs 2" in capsys.readouterr().out  # 40 + 100; 40 + 70

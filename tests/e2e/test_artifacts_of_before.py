"""Run directories, scores, bundles and checkpoints of the release before go on as if nothing had been renamed.

``tests/artifacts/before_rename/README.md`` says how they were made, and by which commit.
"""

import contextlib
import importlib.util
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

import dist_prune
from dist_prune.cli.main import main as command_line
from dist_prune.run import main

BEFORE = Path(__file__).parents[1] / "artifacts/before_rename"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())


def _commands():
    """The module that made the artifacts: it names the words of each run."""
    spec = importlib.util.spec_from_file_location("make_before_rename", BEFORE / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = _commands()


@pytest.fixture
def before(tmp_path):
    """A copy of one of the folders, to run in."""

    def copied(name: str) -> Path:
        return Path(shutil.copytree(BEFORE / name, tmp_path / name))

    return copied


def run(folder: Path, *words: str, first: tuple[str, ...] = MAKE.RECIPE) -> str:
    """Run to the end in this process; everything that it printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main([*first, *words, "--run-dir", str(folder)])
    assert code == 0, output.getvalue()
    return output.getvalue()


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def plan_of(folder: Path) -> str:
    return report(folder)["plan"]["fingerprint"]


def events(folder: Path, event: str) -> list[str]:
    return [line["stage"] for line in report(folder)["events"] if line["event"] == event]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_every_stage_of_a_finished_run_is_skipped(before):
    folder = before("finished")
    ledger = lines(folder)
    stages = [line["stage"] for line in ledger if line["stage"] != "report"]
    files = {file: file.read_bytes() for file in folder.rglob("*.safetensors")}
    run(folder, "score.many=[l1,hrank]")
    assert events(folder, "skipped") == stages == [
        "train", "many", "score", "select", "prune", "finetune", "evaluate", "curves", "export",
    ]  # fmt: skip
    assert lines(folder)[: len(ledger)] == ledger
    assert [line["stage"] for line in lines(folder)[len(ledger) :]] == ["report"]
    assert lines(folder)[-1]["fingerprint"] == ledger[-1]["fingerprint"]
    assert {file: file.read_bytes() for file in folder.rglob("*.safetensors")} == files
    assert plan_of(folder) == EXPECTED["finished"]


def test_select_alone_runs_from_the_old_scores(before):
    """In the old run directory, and by ``score.from`` in a new one."""
    folder = before("finished")
    run(folder, "target.macs=0.4", "score.many=[l1,hrank]")
    assert {"train", "score"} <= set(events(folder, "skipped"))
    assert plan_of(folder) == EXPECTED["score.from"]
    other = folder.parent / "other"
    dense = ("train.epochs=0", f"backbone.checkpoint={folder / 'dense.safetensors'}", f"score.from={folder}")
    run(other, *dense, "target.macs=0.4")
    assert events(other, "taken") == ["score"]
    assert plan_of(other) == EXPECTED["score.from"]


def test_the_old_bundle_gives_the_old_outputs():
    images = torch.arange(2 * 16 * 16, dtype=torch.float32).reshape(2, 1, 16, 16) / 512
    outputs = dist_prune.load(BEFORE / "finished/export")(images)
    assert torch.allclose(outputs, torch.tensor(EXPECTED["outputs"]), rtol=1e-4, atol=1e-5)


def test_compare_and_export_read_the_old_run(before, capsys, tmp_path):
    folder = before("finished")
    assert command_line(["compare", str(folder), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert row["backbone"] == "lenet5_mnist" and row["method"] == "taylor"
    assert row["top1"] == report(BEFORE / "finished")["finetuned"]["top1"]
    assert command_line(["export", str(folder), "--format", "pt2", "--out", str(tmp_path / "files")]) == 0
    (file,) = (tmp_path / "files").glob("*.pt2")
    program = torch.export.load(file).module()
    images = torch.arange(2 * 16 * 16, dtype=torch.float32).reshape(2, 1, 16, 16) / 512
    assert torch.allclose(program(images), torch.tensor(EXPECTED["outputs"]), rtol=1e-4, atol=1e-4)


def test_rounds_that_were_stopped_resume_inside_the_second_scoring(before):
    folder = before("rounds")
    ledger = lines(folder)
    run(folder, *MAKE.ROUNDS)
    assert events(folder, "skipped") == [line["stage"] for line in ledger]
    assert events(folder, "resumed") == ["round_2/score"]
    assert lines(folder)[: len(ledger)] == ledger
    assert plan_of(folder) == EXPECTED["rounds"]


def test_a_training_resumes_at_its_checkpoint(before):
    folder = before("training")
    output = run(folder, *MAKE.TRAINING)
    (event,) = [line for line in report(folder)["events"] if line["event"] == "resumed"]
    assert event == {"stage": "train", "event": "resumed", "epoch": 0, "step": 4}
    assert "damaged" not in output
    assert [line["epoch"] for line in lines(folder)[0]["facts"]["history"]] == list(range(1, 9))


def test_a_stopped_scoring_resumes_from_every_kind_of_partial_state(before):
    folder = before("entropy")
    run(folder, *MAKE.ENTROPY)
    assert events(folder, "resumed") == ["score"]
    assert plan_of(folder) == EXPECTED["entropy"]
    assert not (folder / "round_1/partial").exists()


def test_measurements_on_record_are_not_made_again(before):
    folder = before("shapley")
    old = (folder / "round_1/measured.jsonl").read_text().splitlines()
    run(folder, *MAKE.SHAPLEY)
    new = (folder / "round_1/measured.jsonl").read_text().splitlines()
    assert new[: len(old)] == old
    jobs = [json.dumps(json.loads(line)["job"]) for line in new]
    assert len(set(jobs)) == len(jobs)
    assert plan_of(folder) == EXPECTED["shapley"]


def test_a_task_of_a_sweep_takes_what_an_older_task_made(before, monkeypatch):
    sweep = before("shared").parent
    monkeypatch.chdir(BEFORE)  # the sweep file names its recipe from here
    run(sweep / "1", first=("--sweep", str(BEFORE / "tasks.yaml"), "--task", "1"))
    assert events(sweep / "1", "taken") == ["train", "score"]
    assert plan_of(sweep / "1") == EXPECTED["sweep"]

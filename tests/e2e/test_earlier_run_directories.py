"""Run directories begun before their artifacts were renamed are finished, resumed and reported under their names."""

import json
import shutil
from pathlib import Path

import pytest

import dist_prune
from dist_prune import methods
from dist_prune.config import loading
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.fileio import append_lines, file_digest, seal
from dist_prune.pipeline.earlier_artifact_names import FIRST_NAMES, first_name
from dist_prune.pipeline.ledger import Ledger
from dist_prune.pipeline.runner import ORDER
from dist_prune.pipeline.stage_graph import SHARED
from dist_prune.run import run
from tests.support.launch import SMALL

WORDS = (
    *SMALL, "train.epochs=1", "finetune.epochs=1", "score.images=30", "method.name=taylor", "schedule.rounds=2",
    "schedule.carry_optimizer=true", "report.latency_batches=[1]", "report.trackers=[]",
)  # fmt: skip


def finish(folder: Path) -> dict:
    run(loading.load("quickstart", list(WORDS), methods.options_of), folder, DistributedEnvironment.single_process())
    return json.loads((folder / "report.json").read_text())


def files_of(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new") / "run"
    return folder, finish(folder)


@pytest.fixture
def earlier(finished, tmp_path):
    """The same run directory as an earlier version would have left it."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    for name in files_of(folder):
        (folder / name).rename(folder / first_name(name))
    lines = Ledger(folder).lines()
    for line in lines:
        line["outputs"] = {first_name(name): digest for name, digest in line["outputs"].items()}
    Ledger(folder).file.unlink()
    append_lines(Ledger(folder).file, map(seal, lines))
    return folder


def test_new_runs_write_the_new_names(finished):
    folder, _ = finished
    names = {Path(name).name for name in files_of(folder)}
    assert names >= FIRST_NAMES.keys() - {"criteria.json", "criteria.safetensors"}  # only where criteria are compared
    assert not names & set(FIRST_NAMES.values())
    assert {name for line in Ledger(folder).lines() for name in line["outputs"]} <= files_of(folder)


def test_a_finished_one_is_finished(finished, earlier):
    """Every stage is skipped: names are in fingerprints as they were first."""
    before = files_of(earlier)
    body = finish(earlier)
    skipped = {event["stage"] for event in body["events"] if event["event"] == "skipped"}
    assert skipped == {line["stage"] for line in Ledger(finished[0]).lines()} - {"report"}
    assert files_of(earlier) == before
    for name in ("plan", "finetuned", "rounds"):
        assert body[name] == finished[1][name]
    assert dist_prune.load(earlier / "export") is not None


def test_one_without_answers_is_finished_without_them(finished, tmp_path):
    """Evaluations of earlier versions kept no answers: nothing is measured again, and the page leaves the part out."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    lines = Ledger(folder).lines()
    for line in lines:
        line["outputs"].pop("answers.safetensors", None)
    Ledger(folder).file.unlink()
    append_lines(Ledger(folder).file, map(seal, lines))
    (folder / "answers.safetensors").unlink()
    body = finish(folder)
    assert {"evaluate"} <= {event["stage"] for event in body["events"] if event["event"] == "skipped"}
    assert not {"answers", "calibration", "classes"} & body.keys() and "network" in body
    assert "Calibration of confidence" in (finished[0] / "report.html").read_text()
    assert "Calibration of confidence" not in (folder / "report.html").read_text()


@pytest.mark.parametrize("marked", [True, False])
def test_an_interrupted_one_goes_on_under_its_names(finished, earlier, marked):
    """Cut off before the second round's surgery; known by begun.json, or by its ledger alone."""
    lines = Ledger(earlier).lines()
    last = [line["stage"] for line in lines].index("round_2/select") + 1
    for name in [name for line in lines[last:] for name in line["outputs"]]:
        (earlier / name).unlink()
    Ledger(earlier).file.unlink()
    append_lines(Ledger(earlier).file, map(seal, lines[:last]))
    if not marked:
        (earlier / "begun.json").unlink()
    finish(earlier)
    assert files_of(earlier) == {first_name(name) for name in files_of(finished[0])}
    for name in ("round_2/optimizer_carried.safetensors", "finetuned.safetensors"):
        assert file_digest(earlier / first_name(name)) == file_digest(finished[0] / name)


def test_what_tasks_of_a_sweep_share_was_not_renamed():
    """Tasks with directories of both kinds take it from one another."""
    for name in [name for stage in ORDER if stage.label in SHARED for name in stage.outputs]:
        assert first_name(name) == name

"""The stage repair as a user runs it: on two ranks, in rounds, resumed; old runs have no such stage."""

import json

import pytest
import torch

from dist_prune import methods
from dist_prune.config import loading
from dist_prune.distributed import tensor_files
from dist_prune.pipeline.stage_graph import stages_of, stages_of_recipe
from tests.support.launch import PYTHON, SMALL, TORCHRUN, finish, report, run

REPAIRED = (
    *SMALL, "repair.method=least_squares", "repair.images=64", "finetune.epochs=0", "report.latency_batches=[1]",
    "report.trackers=[]", "method.name=reconstruction",
)  # fmt: skip


def stages_in(folder) -> list[str]:
    return [json.loads(line)["stage"] for line in (folder / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_with_repair(tmp_path):
    folder, output = finish(PYTHON, tmp_path / "run", *REPAIRED)
    assert stages_in(folder)[3:6] == ["prune", "repair", "finetune"]
    body = report(folder)
    assert body["repaired"]["top1"] > body["pruned"]["top1"]
    assert body["repaired"]["top1"] == body["finetuned"]["top1"]  # zero epochs start from the repaired weights
    assert body["repaired"]["params"] == body["pruned"]["params"]
    assert "G for second moments, tables of up to" in output
    assert "repaired" in (folder / "report.html").read_text()
    assert not list(folder.rglob("partial_repair"))
    _, said = finish(PYTHON, folder, *REPAIRED, "repair.method=bias")
    assert "prune: done before, skipped" in said
    assert "repair: bias, 64 images" in said
    assert report(folder)["repaired"]["loss"] != body["repaired"]["loss"]


@pytest.mark.slow
def test_rounds_are_repaired_each_and_ranks_agree(tmp_path):
    words = (*REPAIRED, "schedule.rounds=2", "schedule.finetune_epochs=1")
    one, output = finish(PYTHON, tmp_path / "one", *words)
    assert [name for name in stages_in(one) if "repair" in name] == ["repair", "round_2/repair"]
    assert "% repaired, " in output
    assert all("repaired_top1" in line for line in report(one)["rounds"])
    same = (*REPAIRED, "train.epochs=0", f"backbone.checkpoint={one / 'dense.safetensors'}")  # trained once
    two, _ = finish(TORCHRUN, tmp_path / "two", *same)
    single, _ = finish(PYTHON, tmp_path / "single", *same)
    assert report(two)["plan"]["fingerprint"] == report(single)["plan"]["fingerprint"]
    repaired = [tensor_files.read_tensors(run / "round_1/repaired.safetensors")[0] for run in (two, single)]
    assert all(torch.equal(tensor, repaired[1][name]) for name, tensor in repaired[0].items())


def test_without_repair_there_is_no_such_stage():
    recipe = loading.load("quickstart", [], methods.options_of)
    assert stages_of_recipe(recipe) == stages_of(1)
    assert "repair" not in {stage.name for stage in stages_of(3)}
    with_repair = loading.load("quickstart", ["repair.method=norms"], methods.options_of)
    names = [stage.name for stage in stages_of_recipe(with_repair)]
    assert names[names.index("prune") + 1] == "repair"
    plain = {stage.label: stage.reads for stage in stages_of(1)}
    assert all(plain[s.label] == s.reads for s in stages_of_recipe(with_repair) if s.label in plain)


def test_a_bundle_is_not_repaired(tmp_path):
    code, said = run(PYTHON, tmp_path / "run", *REPAIRED, f"select.plan={tmp_path}", "target.macs=")
    assert code == 2
    assert "repair.method: least_squares repairs what was just cut" in said

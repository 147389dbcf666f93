"""Whole blocks as a user removes them: two rounds with a repair on two ranks, one plan, a bundle, a run from it."""

from pathlib import Path

import pytest
import torch

import dist_prune
from dist_prune.cli import main
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery.depth_surgery import PassThrough
from tests.support.launch import PYTHON, SMALL, TORCHRUN, finish, report, run

RUN = (
    *SMALL, "backbone.name=resnet20_cifar", "backbone.kwargs={img_size: 8}", "select.depth=true", "target.macs=0.5",
    "method.name=taylor",
    "schedule.rounds=2", "schedule.carry_optimizer=true", "repair.method=least_squares", "repair.images=32",
    "target.tolerance=0.05", "train.epochs=1", "finetune.epochs=1", "report.latency_batches=[1]", "report.trackers=[]",
)  # fmt: skip


def plan_at(folder: Path, number: int) -> Plan:
    return Plan.from_json((folder / f"round_{number}/plan.json").read_text())


def test_blocks_go_in_a_run(tmp_path):
    folder, output = finish(PYTHON, tmp_path / "run", *RUN, "schedule.rounds=1", "schedule.carry_optimizer=false")
    plan, body = plan_at(folder, 1), report(folder)
    assert plan.blocks_removed and 0.45 < body["achieved"]["macs"] <= 0.5
    assert f"{len(plan.blocks_removed)} residual blocks go: {', '.join(plan.blocks_removed)}" in output


@pytest.mark.slow
def test_two_rounds_of_blocks(tmp_path, capsys):
    folder, output = finish(TORCHRUN, tmp_path / "run", *RUN)
    body, first, last = report(folder), plan_at(folder, 1), plan_at(folder, 2)
    assert first.blocks_removed and set(first.blocks_removed) < set(last.blocks_removed)
    assert body["plan"]["blocks_removed"] == list(last.blocks_removed)
    assert f"{len(last.blocks_removed)} residual blocks gone: {last.blocks_removed[0]}" in output
    inside = [g for g in body["plan"]["groups"] if g["name"].startswith(f"{last.blocks_removed[0]}.")]
    assert inside and all(group["kept"] == 0 for group in inside)
    model = dist_prune.load(folder / "export")
    assert sum(p.numel() for p in model.parameters()) == body["finetuned"]["params"]
    assert all(isinstance(model.get_submodule(path), PassThrough) for path in last.blocks_removed)
    assert main.main(["plan", str(folder)]) == 0
    assert f"residual blocks go: {', '.join(last.blocks_removed)}" in capsys.readouterr().out


@pytest.mark.slow
def test_blocks_in_other_places(tmp_path):
    """One process makes the plan of two; a run goes on from the bundle; a plan is replayed, or refused with a hint."""
    folder, _ = finish(TORCHRUN, tmp_path / "run", *RUN, "finetune.optimizer=adamw", "finetune.lr=0.001")
    dense = ("train.epochs=0", f"backbone.checkpoint={folder / 'dense.safetensors'}")
    alone, _ = finish(PYTHON, tmp_path / "alone", *RUN, *dense)
    assert plan_at(folder, 1).fingerprint == plan_at(alone, 1).fingerprint
    rest = ("schedule.rounds=1", "schedule.carry_optimizer=false", "train.epochs=0", "select.depth=false")
    again, _ = finish(PYTHON, tmp_path / "again", *RUN, f"backbone.bundle={folder / 'export'}", *rest)
    small = dist_prune.load(again / "export")
    model = dist_prune.load(folder / "export")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    plan = folder / "round_2/plan.json"
    replay = (f"select.plan={plan}", "target.macs=", *dense, *rest[:2])
    replayed, _ = finish(PYTHON, tmp_path / "replayed", *RUN, *replay)
    assert plan_at(replayed, 1).fingerprint == plan_at(folder, 2).fingerprint
    code, output = run(PYTHON, tmp_path / "refused", *RUN, *replay, "select.depth=false")
    assert code == 2 and "Write select.depth=true" in output
    model.train()(torch.randn(4, 1, 8, 8)).sum().backward()

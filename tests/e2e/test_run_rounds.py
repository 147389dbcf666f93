"""Rounds as a user runs them: real launchers, real kills, one plan at the end."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dist_prune
from dist_prune import methods
from dist_prune.config import loading
from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.errors import PruneError
from dist_prune.pipeline.precheck import precheck
from dist_prune.pipeline.runner import ORDER, fingerprint, stages_of
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.run import run as whole_run
from tests.stages.test_trainings import work_of
from tests.support.launch import PYTHON, SMALL, TORCHRUN, finish, report, run, start, wait_for

ROUNDS = (
    *SMALL, "method.name=taylor", "schedule.rounds=2", "schedule.carry_optimizer=true", "finetune.ema=0.9",
    "finetune.epochs=1", "report.latency_batches=[1]", "report.trackers=[]",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two rounds on two ranks."""
    return finish(TORCHRUN, tmp_path_factory.mktemp("rounds") / "run", *ROUNDS)


def plan_at(folder: Path, number: int) -> Plan:
    return Plan.from_json((folder / f"round_{number}/plan.json").read_text())


def stages_in(folder: Path) -> list[str]:
    return [json.loads(line)["stage"] for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_two_rounds_leave_one_plan(finished):
    folder, output = finished
    assert stages_in(folder) == [
        "train", "score", "select", "prune", "round_1/finetune", "round_2/score", "round_2/select", "round_2/prune",
        "finetune", "evaluate", "curves", "export", "report",
    ]  # fmt: skip
    body, first, last = report(folder), plan_at(folder, 1), plan_at(folder, 2)
    assert body["plan"]["fingerprint"] == last.fingerprint
    assert all(set(gone) <= set(last.removed[group]) for group, gone in first.removed.items())
    cut = Plan.from_json((folder / "round_2/cut.json").read_text())
    assert first.then(cut) == last
    model = dist_prune.load(folder / "export")
    assert sum(p.numel() for p in model.parameters()) == body["finetuned"]["params"]
    rounds = body["rounds"]
    assert [line["round"] for line in rounds] == [1, 2]
    assert [line["target"] for line in rounds] == pytest.approx([0.55**0.5, 0.55])
    assert all(0.9 * line["target"] < line["macs"] <= line["target"] for line in rounds)
    assert rounds[1]["macs"] == body["achieved"]["macs"]
    assert rounds[1]["finetuned_top1"] == body["finetuned"]["top1"]
    assert rounds[0]["finetuned_top1"] > 50
    assert "round 1: " in output
    assert "Rounds: shares of the dense network" in (folder / "report.html").read_text()
    assert not list(folder.rglob("*checkpoint*")) + list(folder.rglob("*partial*"))


def test_what_was_carried_is_what_was_left_cut_by_the_plan(finished):
    folder, _ = finished
    files = ("round_1/optimizer_state.safetensors", "round_2/optimizer_carried.safetensors")
    left, carried = (tensor_files.read_tensors(folder / name)[0] for name in files)
    small = tensor_files.read_tensors(folder / "round_2/pruned.safetensors")[0]
    assert left.keys() == carried.keys()
    for table in ("model", "ema"):
        for name, tensor in small.items():
            assert carried[f"{table}/{name}"].shape == tensor.shape
            if table == "ema":
                assert torch.equal(carried[f"ema/{name}"], tensor), "the averages are the network that goes on"
    assert any(name.startswith("optimizer/momentum_buffer/") for name in carried)


def test_the_second_round_is_the_same_on_one_rank(finished, tmp_path):
    """From the weights that two ranks trained, the same bits: what comes behind the second round is skipped as well."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "round_2")
    assert go(folder, *ROUNDS) == ""
    assert stages_in(folder)[-4:] == ["round_2/score", "round_2/select", "round_2/prune", "report"]
    skipped = {event["stage"] for event in report(folder)["events"] if event["event"] == "skipped"}
    assert {"train", "prune", "round_1/finetune", "finetune", "evaluate", "export"} <= skipped
    assert plan_at(folder, 2) == plan_at(finished[0], 2)


@pytest.mark.slow
def test_rounds_without_training_are_the_same_on_any_number_of_ranks(finished, tmp_path):
    """Scores of the second round are of new batch-norm statistics, which are exact over ranks as well."""
    words = (
        *ROUNDS[:-4], "report.latency_batches=[1]", f"backbone.checkpoint={finished[0] / 'dense.safetensors'}",
        "train.epochs=0",
        "schedule.carry_optimizer=false", "schedule.finetune_epochs=0", "finetune.epochs=0",
        "finetune.recalibrate_bn=64",
    )  # fmt: skip
    assert go(tmp_path / "one", *words) == ""
    code, output = run(TORCHRUN, tmp_path / "two", *words)
    assert code == 0, output
    for file in ("round_1/finetuned.safetensors", "round_2/plan.json", "round_2/pruned.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


@pytest.mark.slow
def test_killed_inside_rounds_and_run_again(finished, tmp_path):
    """SIGKILL in the finetuning between the rounds, then in the second scoring: the end is the same."""
    words = (
        *ROUNDS, f"backbone.checkpoint={finished[0] / 'dense.safetensors'}", "train.epochs=0", "score.images=400",
        "score.micro_batch=2",
        "score.save_every=5", "schedule.finetune_epochs=3",
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert go(whole, *words) == ""
    for file in ("round_1/finetune_checkpoints/*.sha256", "round_2/partial/observation_1.safetensors"):
        process = start(PYTHON, cut, *words)
        wait_for(process, lambda file=file: any(cut.glob(file)))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"it was not killed while {file} was there"
    assert go(cut, *words) == ""
    resumed = {event["stage"] for event in report(cut)["events"] if event["event"] == "resumed"}
    assert resumed == {"round_1/finetune", "round_2/score"}
    assert plan_at(whole, 2) == plan_at(cut, 2)
    for file in ("round_2/optimizer_carried.safetensors", "finetuned.safetensors"):
        one, two = (tensor_files.read_tensors(folder / file)[0] for folder in (whole, cut))
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items()), file


def test_other_keys_of_the_end_leave_the_rounds_alone(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    assert go(folder, *ROUNDS, "finetune.epochs=2") == ""
    added = stages_in(folder)[len(stages_in(finished[0])) :]
    assert added == ["finetune", "evaluate", "export", "report"]


def go(folder: Path, *words: str) -> str:
    return whole_run(
        loading.load("quickstart", list(words), methods.options_of), folder, DistributedEnvironment.single_process()
    )


def test_one_shot_does_not_know_of_rounds(tmp_path):
    assert stages_of(1) == ORDER
    plain = work_of(tmp_path)
    other = work_of(tmp_path, "schedule.spacing=linear", "schedule.finetune_epochs=7")
    assert fingerprint(ORDER[0], plain) == fingerprint(ORDER[0], other)
    assert [stage.label for stage in ORDER] == [stage.name for stage in ORDER]
    assert not [stage.name for stage in ORDER for field in stage.reads if field.startswith("schedule")]
    labels = [stage.label for stage in stages_of(3)]
    assert len(set(labels)) == len(labels) == len(ORDER) + 2 * 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("method.name=mint", "method.p=[0.5]"), "rounds of mint make no sense: it masks blocks of weights"),
        (("method.name=sensitivity", "target.macs=null"), "rounds of sensitivity make no sense: its masks and weights"),
        (("target.macs=null", "target.latency=0.5"), "rounds of target.latency are not offered"),
        (("target.macs=null", "select.plan=there.json"), r"rounds of a plan that is replayed \(select.plan\)"),
        (
            ("schedule.carry_optimizer=true", "schedule.finetune_epochs=0"),
            "with schedule.finetune_epochs 0 no state is there",
        ),
        (("schedule.carry_optimizer=true", "schedule.rounds=1"), "there is no round to carry a state to"),
        (("schedule.finetune_epochs=0", "finetune.batch=1", "finetune.epochs=1"), r"finetune\.batch: 1"),
        (("finetune.batch=1", "finetune.epochs=0"), r"finetune\.batch: 1"),
    ],
)
def test_rounds_that_make_no_sense_are_refused_before_any_work(tmp_path, words, said):
    with pytest.raises(PruneError, match=said):
        precheck(work_of(tmp_path, "schedule.rounds=2", *words))


class Sharded(DistributedEnvironment):
    """As under DeepSpeed's ZeRO-2."""

    zero_stage = property(lambda self: 2)  # type: ignore[assignment]


def test_no_state_is_carried_under_deepspeed(tmp_path):
    context = work_of(tmp_path, "schedule.rounds=2", "schedule.carry_optimizer=true")
    precheck(context)
    alone = context.environment
    with pytest.raises(PruneError, match=r"schedule\.carry_optimizer: DeepSpeed shards the optimizer's state"):
        precheck(replace(context, environment=Sharded(alone.device, alone.comm)))


def test_new_weights_after_cutting_are_for_one_shot(tmp_path):
    words = ["backbone.name=vgg16_bn_cifar", "backbone.kwargs={}", "data.image_size=32", "schedule.rounds=2"]
    kind = methods.find("graph")
    context = replace(work_of(tmp_path, *words), method=kind(kind.Options(quirks=("fresh_classifier",))))
    with pytest.raises(PruneError, match=r"the released code gives .* new weights after cutting"):
        precheck(context)


def test_a_warm_up_longer_than_the_epochs_between_is_refused():
    words = ["schedule.rounds=2", "finetune.schedule=onecycle", "finetune.epochs=9", "finetune.warmup_epochs=2"]
    with pytest.raises(PruneError, match=r"schedule\.finetune_epochs: .*cosine climbs to lr for warmup_epochs"):
        loading.load("quickstart", [words[0], "finetune.schedule=cosine", *words[2:]], methods.options_of)
    with pytest.raises(PruneError, match=r"schedule\.finetune_epochs: .*onecycle climbs to lr for warmup_epochs"):
        loading.load("quickstart", words, methods.options_of)


def test_the_dense_widths_hold_floors_over_all_rounds(finished, tmp_path):
    """A group keeps half of its dense channels at least, not half of a half."""
    weights = f"backbone.checkpoint={finished[0] / 'dense.safetensors'}"
    words = (*ROUNDS[:3], *SMALL[4:], weights, "train.epochs=0", "method.name=l1", "schedule.rounds=3",
             "schedule.finetune_epochs=0", "finetune.epochs=0", "select.max_ratio=0.5", "target.macs=0.4",
             "select.scope=global", "report.trackers=[]")  # fmt: skip
    assert go(tmp_path / "run", *words) == ""
    last = plan_at(tmp_path / "run", 3)
    assert all(2 * last.counts[group] >= width for group, width in last.widths.items())
    assert any(2 * last.counts[group] == width for group, width in last.widths.items())
    model = dist_prune.load(tmp_path / "run/export")
    dense = tensor_files.read_tensors(finished[0] / "dense.safetensors")[0]
    whole = work_of(tmp_path / "run", *words[:2]).networks.create()
    whole.load_state_dict(dense)
    channels = trace_groups(whole.eval(), torch.zeros(1, 1, 8, 8))
    surgeon.apply_plan(whole, channels, last)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in whole.state_dict().items())

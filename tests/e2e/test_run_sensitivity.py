"""Learned masks through a whole run under real DistributedDataParallel: rounds, surgery, report, TensorBoard."""

import json

import pytest
import torch

import dist_prune
from dist_prune import models
from dist_prune.distributed import tensor_files
from dist_prune.methods.base import TRAINED
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery import surgeon
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support.launch import ACCELERATE, PYTHON, SMALL, finish, report, run

LEARNED = (
    *SMALL, "method.name=sensitivity", "target.macs=null", "method.keep=0.5", "method.epochs=2", "method.batch=12",
    "method.window=4", "method.beta=[20,100]", "method.beta_every=4", "finetune.epochs=1",
)  # fmt: skip

pytestmark = pytest.mark.slow  # all of them look at one run, which takes half a minute


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of two ranks through accelerate."""
    return finish(ACCELERATE, tmp_path_factory.mktemp("sensitivity") / "run", *LEARNED)


def test_surgery_starts_from_the_trained_weights(finished):
    folder, _ = finished
    plan = Plan.from_json((folder / "round_1/plan.json").read_text())
    assert len(plan.removed) == 3
    scores, _ = tensor_files.read_tensors(folder / "round_1/scores.safetensors")
    model = models.create("resnet8p_cifar", 10, 1, kwargs={"img_size": 8}).eval()
    channels = trace_groups(model, torch.zeros(1, 1, 8, 8))
    model.load_state_dict({n.removeprefix(TRAINED): t for n, t in scores.items() if n.startswith(TRAINED)})
    surgeon.apply_plan(model, channels, plan)
    small, _ = tensor_files.read_tensors(folder / "round_1/pruned.safetensors")
    assert all(torch.equal(tensor, small[name]) for name, tensor in model.state_dict().items())
    dense, _ = tensor_files.read_tensors(folder / "dense.safetensors")
    assert not torch.equal(dense["linear.weight"], small["linear.weight"])
    assert not (folder / "round_1/partial").exists()
    assert dist_prune.load(folder / "export")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_the_report_and_tensorboard_show_the_rounds(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, output = finished
    body = report(folder)
    assert [row["round"] for row in body["table"]] == [1, 2, 3]
    assert {"beta", "lambda", "kept", "target", "held_out_top1"} <= body["table"][0].keys()
    assert "held_out_top1" in (folder / "report.html").read_text()
    assert body["dense"]["thop_old"] > body["pruned"]["thop_old"] > body["pruned"]["macs"]
    assert "round_3 2/2" in output
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0})
    found.Reload()
    tags = found.Tags()
    assert "round_2/layer2.0.conv1/mask" in tags["histograms"]
    assert {"round_2/layer2.0.conv1/lambda", "round_2/layer2.0.conv1/kept", "round_2/loss"} <= set(tags["scalars"])
    assert len(found.Histograms("round_2/layer2.0.conv1/mask")) == 4, "16 updates, windows of 4"


def test_another_floor_goes_on_from_the_same_masks(finished):
    folder, _ = finished
    before = json.loads((folder / "round_1/plan.json").read_text())["fingerprint"]
    code, output = run(PYTHON, folder, *LEARNED, "select.round_to=8", "finetune.epochs=0")
    assert code == 0, output
    assert "score: done before, skipped" in output
    assert report(folder)["plan"]["fingerprint"] != before
    code, output = run(PYTHON, folder, *LEARNED, "select.exclude=[layer1.*]")
    assert code == 2
    assert "select.exclude: masks are learned while scoring" in output

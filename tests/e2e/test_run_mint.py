"""Masks through a whole run under real DistributedDataParallel: prune, finetune, evaluate, export, load."""

import json

import pytest
import torch

import dist_prune
from dist_prune import models
from dist_prune.distributed import tensor_files
from dist_prune.pruning.plan.block_masks import mask_violations, weight_masks
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support.launch import ACCELERATE, PYTHON, SMALL, finish, report, run

MASKED = (
    *SMALL, "method.name=mint", "target.macs=null", "method.groups=8", "method.p=[0.3,0.5]", "select.index=2",
    "reruns=2", "finetune.momentum=0.9", "finetune.weight_decay=0.01", "score.images=150", "score.balance=class",
)  # fmt: skip

pytestmark = pytest.mark.slow  # all of them look at one run, which takes half a minute


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of two ranks through accelerate."""
    return finish(ACCELERATE, tmp_path_factory.mktemp("mint") / "run", *MASKED)


def test_exact_zeros_from_the_plan_to_the_bundle(finished):
    folder, _ = finished
    plan = Plan.from_json((folder / "round_1/plan.json").read_text())
    channels = trace_groups(
        models.create("resnet8p_cifar", 10, 1, kwargs={"img_size": 8}).eval(), torch.zeros(1, 1, 8, 8)
    )
    tuned, _ = tensor_files.read_tensors(folder / "finetuned.safetensors")
    masks = weight_masks(plan, channels, tuned)
    assert len(masks) > 3
    assert mask_violations(tuned, masks) == []
    small, _ = tensor_files.read_tensors(folder / "round_1/pruned.safetensors")
    assert any(not torch.equal(tuned[name], small[name]) for name in masks), "the finetune changed the others"
    loaded = dist_prune.load(folder / "export").state_dict()
    assert mask_violations(loaded, masks) == []
    body = json.loads((folder / "export/bundle.json").read_text())
    assert body["plan"]["blocks"].keys() == plan.blocks.keys()


def test_the_report_counts_sparse_sizes_and_says_what_masks_do_not_do(finished):
    folder, output = finished
    body = report(folder)
    dense, tuned = (body[kind]["sparse"] for kind in ("dense", "finetuned"))
    assert dense["pruned_percent"] == 0
    assert tuned["pruned_percent"] > 40
    assert tuned["masked_macs"] < body["finetuned"]["macs"] <= body["dense"]["macs"]
    assert tuned["csr_bytes"] < dense["csr_bytes"]
    assert tuned["nonzero"] / dense["nonzero"] == pytest.approx(body["achieved"]["weights"], abs=1e-4)
    assert [row["p"] for row in body["table"]] == [0.3, 0.5]
    assert len(body["reruns"]["top1"]) == 2
    assert body["reruns"]["top1"][0] == pytest.approx(body["finetuned"]["top1"])
    assert body["reruns"]["std"] >= 0
    for said in ("they run as slow as dense ones", "weights pruned %", "CSR file (MiB)", "MACs not on masked zeros"):
        assert said in output
        assert said in (folder / "report.html").read_text()


def test_another_value_of_the_grid_goes_on_from_the_same_scores(finished):
    folder, _ = finished
    before = report(folder)["plan"]["fingerprint"]
    code, output = run(PYTHON, folder, *MASKED, "select.index=1", "finetune.epochs=0", "reruns=1")
    assert code == 0, output
    assert "score: done before, skipped" in output
    assert report(folder)["plan"]["fingerprint"] != before

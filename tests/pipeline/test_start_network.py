"""Runs that start from a bundle: finetuned as it is, pruned further, with a head for other classes."""

import json
from pathlib import Path

import pytest
import torch

from dist_prune.export import bundle
from tests.support import tiny
from tests.support.launch import PYTHON, report, run

WORDS = (
    "backbone.name=resnet8p_cifar", "backbone.kwargs={img_size: 8}", "train.epochs=0", "finetune.epochs=1",
    "finetune.lr=0.01", "score.images=50", "score.micro_batch=10", "report.latency_repeats=1",
    "report.latency_batches=[1]", "report.trackers=[]",
)  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    return tiny.bundled(tmp_path_factory.mktemp("given") / "bundle")


@pytest.mark.slow
def test_a_bundle_is_finetuned_as_it_is(given, tmp_path):
    code, output = run(PYTHON, tmp_path / "run", *WORDS, f"backbone.bundle={given}", f"select.plan={given}", "target=")
    assert code == 0, output
    old, new = bundle.read_bundle(given), bundle.read_bundle(tmp_path / "run")
    assert new.plan.fingerprint == old.plan.fingerprint
    assert {n: t.shape for n, t in new.weights.items()} == {n: t.shape for n, t in old.weights.items()}
    assert not torch.equal(new.weights["conv1.weight"], old.weights["conv1.weight"])
    assert new.body["origin"]["started_from"]["weights_digest"] == old.body["weights_digest"]
    assert new.body["origin"]["method"] == "l1", "the method that cut it, not one of the recipe"
    assert new.small()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    body = report(tmp_path / "run")
    assert body["dense"]["macs"] == body["finetuned"]["macs"]
    assert body["dense"]["top1"] == body["pruned"]["top1"]


@pytest.mark.slow
def test_a_bundle_is_pruned_further(given, tmp_path):
    code, output = run(
        PYTHON, tmp_path / "run", *WORDS, f"backbone.bundle={given}", "target.macs=0.7", "target.tolerance=",
        "method.name=l1", "finetune.epochs=0",
    )  # fmt: skip
    assert code == 0, output
    old, new = bundle.read_bundle(given), bundle.read_bundle(tmp_path / "run")
    before, after = old.plan.counts, new.plan.counts
    assert new.plan.widths == old.plan.widths, "in coordinates of the dense network"
    assert all(after[name] <= before[name] for name in before)
    assert sum(after.values()) < sum(before.values())
    assert all(set(old.plan.removed[name]) <= set(new.plan.removed[name]) for name in old.plan.removed)
    small = new.small()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in old.small().parameters())
    body = report(tmp_path / "run")
    assert 0.5 < body["achieved"]["macs"] <= 0.75


@pytest.mark.slow
def test_another_head_needs_a_training(given, tmp_path):
    words = (*WORDS, "data.classes=[1,3,5]", f"backbone.bundle={given}", f"select.plan={given}", "target=")
    code, output = run(PYTHON, tmp_path / "none", *words)
    assert code == 2
    assert "that of the bundle has 10 classes" in output
    assert "set train.epochs" in output
    code, output = run(PYTHON, tmp_path / "new", *words, "train.epochs=1", "train.warmup_epochs=0")
    assert code == 0, output
    assert "re-initialised for 3 classes" in output
    assert bundle.read_bundle(tmp_path / "new").small()(torch.zeros(1, 1, 8, 8)).shape == (1, 3)


@pytest.mark.slow
def test_what_is_refused(given, tmp_path):
    words = (*WORDS, f"select.plan={given}", "target=")
    code, output = run(PYTHON, tmp_path / "a", *words, f"backbone.bundle={given}", "backbone.name=resnet20_cifar")
    assert code == 2
    assert "Write backbone.name=resnet8p_cifar" in output
    code, output = run(PYTHON, tmp_path / "b", *words, f"backbone.bundle={given}", "finetune.distill=0.5")
    assert code == 2
    assert "the bundle holds no dense network to learn from" in output
    code, output = run(PYTHON, tmp_path / "c", *words, f"backbone.bundle={tmp_path}")
    assert code == 2
    assert "there is no bundle in" in output


@pytest.mark.slow
def test_a_dense_network_teaches_a_bundle(given, tmp_path):
    torch.save(tiny.network().float().state_dict(), tmp_path / "dense.pth")
    words = (*WORDS, f"backbone.bundle={given}", f"select.plan={given}", "target=", "finetune.distill=0.5")
    code, output = run(PYTHON, tmp_path / "run", *words, f"backbone.checkpoint={tmp_path / 'dense.pth'}")
    assert code == 0, output
    assert json.loads((tmp_path / "run/export/bundle.json").read_text())["origin"]["finetune_epochs"] == 1

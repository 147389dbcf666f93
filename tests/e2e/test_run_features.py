"""Whole runs of a tower on images without classes: scored, repaired, finetuned, exported, on one rank and on two."""

import pytest
import torch

from dist_prune import models
from dist_prune.distributed import tensor_files
from dist_prune.export import bundle
from tests.support import masks
from tests.support.launch import PYTHON, TORCHRUN, report, run

pytestmark = pytest.mark.slow
WORDS = (
    "backbone.name=features:mobilenetv3_small_050", "data.source=images", "data.train_split=train/images",
    "data.eval_split=val/images", "data.image_size=[32,48]", "data.workers=0", "score.images=all",
    "score.micro_batch=2", "repair.images=8", "target.macs=0.7", "finetune.batch=8", "finetune.epochs=2",
    "evaluate.batch=5", "report.latency_batches=[1]", "report.latency_repeats=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    masks.write(folder / "photographs", count=21)
    torch.manual_seed(0)
    tower = models.create("features:mobilenetv3_small_050", 1, 3)
    tensor_files.save_tensors(folder / "dense.safetensors", tower.state_dict())
    return folder


def start(launcher, place, folder):
    words = (*WORDS, f"data.root={place}/photographs", f"backbone.checkpoint={place}/dense.safetensors")
    recipe = {"recipe": "mobilenetv2_tower_taylor", "DIST_PRUNE_DATA": str(place)}
    code, output = run(launcher, folder, *words, **recipe)
    assert code == 0, output
    return output


def test_a_tower_without_classes_runs_and_two_ranks_agree(place, tmp_path):
    output = start(PYTHON, place, tmp_path / "one")
    assert "k-NN top-1 is left out: the images have no classes" in output
    one = report(tmp_path / "one")
    assert one["task"]["name"] == "features"
    assert one["dense"]["cka"] == pytest.approx(1)
    assert one["finetuned"]["loss"] < one["pruned"]["loss"]
    assert "knn" not in one["finetuned"]
    tower = bundle.load(tmp_path / "one")
    assert bundle.read_bundle(tmp_path / "one").shape == (3, 32, 48)
    assert tower(torch.zeros(2, 3, 32, 48))["pooled"].shape[0] == 2
    start(TORCHRUN, place, tmp_path / "two")
    two = report(tmp_path / "two")
    assert one["plan"]["fingerprint"] == two["plan"]["fingerprint"]
    for network in ("dense", "pruned"):
        for key in ("cka", "loss"):
            assert one[network][key] == two[network][key]

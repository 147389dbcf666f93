"""The commonest start there is: a checkpoint of other classes, and a folder of images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import dist_prune
from dist_prune.distributed import tensor_files
from tests.support.launch import PYTHON, report, run

CLASSES = {"airplane": 0, "automobile": 1, "frog": 6, "ship": 8}
TRAIN, VAL = 60, 50
RECIPES = {"weights": "resnet18_folder", "nothing": "resnet18_folder_taylor"}


@pytest.fixture
def folder(data, tmp_path):
    """Four classes of CIFAR-10 as image files."""
    with np.load(data / "cifar10.npz") as arrays:
        for split, part, count in (("train", "train", TRAIN), ("val", "test", VAL)):
            images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"].reshape(-1)
            for name, number in CLASSES.items():
                place = tmp_path / "images" / split / name
                place.mkdir(parents=True)
                for n, pixels in enumerate(images[labels == number][:count]):
                    Image.fromarray(pixels).save(place / f"{n}.png")
    return tmp_path / "images"


@pytest.mark.slow
def test_weights_of_ten_classes_learn_four_and_are_cut(folder, data, tmp_path):
    """The documented recipe with another network's real weights: better than from nothing, and cut afterwards."""
    weights = data / "weights" / "resnet20_cifar10.safetensors"
    words = (
        "backbone.name=resnet20_cifar", "backbone.pretrained=false", "data.image_size=32", "data.workers=0",
        "data.mean=[0.485,0.456,0.406]", "data.std=[0.229,0.224,0.225]", "data.augment=none", "train.epochs=2",
        "train.batch=24", "finetune.batch=24", "train.warmup_epochs=0", "finetune.warmup_epochs=0", "finetune.epochs=1",
        "train.selection=last", "finetune.selection=last", "score.images=40", "score.micro_batch=20", "target.macs=0.7",
        "report.latency_repeats=1", "report.latency_batches=[1]", "report.trackers=[]",
    )  # fmt: skip
    top1 = {}
    for name, more in (("weights", (f"backbone.checkpoint={weights}",)), ("nothing", ())):
        place = tmp_path / name
        code, output = run(PYTHON, place, *words, *more, recipe=RECIPES[name], DATA=str(folder))
        assert code == 0, output
        top1[name] = report(place)["dense"]["top1"]
        assert ("the head linear is re-initialised for 4 classes" in output) == (name == "weights")
    assert top1["weights"] > 80, "ten of its classes it knew, these four among them"
    assert top1["nothing"] < 70, top1
    body = report(tmp_path / "weights")
    assert 0.6 < body["achieved"]["macs"] <= 0.7
    network = dist_prune.load(tmp_path / "weights")
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    bundle = json.loads((tmp_path / "weights/export/bundle.json").read_text())
    assert bundle["classes"] == sorted(CLASSES), "the names of the folders, in the order of the outputs"
    events = [event["event"] for event in body["events"] if event["stage"] == "train"]
    assert any("(that of resnet20_cifar10.safetensors has 10 classes)" in event for event in events)
    dense, _ = tensor_files.read_tensors(tmp_path / "weights/dense.safetensors")
    assert dense["linear.weight"].shape == (4, 64)
    code, output = run(
        PYTHON, tmp_path / "none", *words, f"backbone.checkpoint={weights}", "train.epochs=0",
        recipe="resnet18_folder_taylor", DATA=str(folder),
    )  # fmt: skip
    assert code == 2
    assert "the data has 4 classes, the head 'linear' of" in output

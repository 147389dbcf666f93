"""A whole run from tar shards on the node's own disk, decoded by another library, augmented on the device."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_prune.cli.main import main
from dist_prune.config import safe_parsing
from tests.support.launch import PYTHON, SMALL, TORCHRUN, report, run

WORDS = (
    *SMALL, "data.source=tar", "data.image_size=32", "data.crop=1.0", "data.mean=[0.5,0.5,0.5]",
    "data.std=[0.3,0.3,0.3]", "data.workers=1", "train.epochs=1", "finetune.epochs=1", "score.images=30",
    "train.batch=16", "finetune.batch=16", "data.augment=crop_flip", "backbone.kwargs={img_size: 32}",
)  # fmt: skip
NEW = ("data.decoder=torchvision", "data.augment_on=device", "data.stage_to=${NODE_DISK}")


@pytest.fixture
def shards(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for split, name in (("train", "train"), ("val", "eval")):
        for number in range(48):
            folder = tmp_path / "folder" / split / "abc"[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.kron(rng.integers(0, 256, (5, 5, 3), np.uint8), np.ones((9, 8, 1), np.uint8))
            Image.fromarray(pixels).save(folder / f"{number:02}.jpg")
        words = ["pack", "--source", str(tmp_path / "folder"), "--split", name, "--out", str(tmp_path / "shards")]
        assert main([*words, "--name", "toy"]) == 0
    return tmp_path / "shards"


@pytest.mark.slow
def test_staged_shards_and_their_keys_in_recipe_report_and_bundle(shards, tmp_path):
    words, disk = (*WORDS, f"data.root={shards}"), str(tmp_path / "node")
    code, output = run(TORCHRUN, tmp_path / "two", *words, *NEW, NODE_DISK=disk)
    assert code == 0, output
    assert output.count("data: copying 2 files") == 1
    recipe = safe_parsing.read_yaml(tmp_path / "two" / "recipe.yaml")
    assert recipe["data"]["stage_to"] == "${NODE_DISK}" and recipe["data"]["decoder"] == "torchvision"
    body, bundle = report(tmp_path / "two"), json.loads((tmp_path / "two/export/bundle.json").read_text())
    assert body["images"]["eval_transform"]["decoder"] == "torchvision"
    assert body["images"]["training"]["augment_on"] == "device"
    assert (bundle["image"]["decoder"], bundle["image"]["augment_on"]) == ("torchvision", "device")
    code, output = run(TORCHRUN, tmp_path / "plain", *words)
    assert code == 0, output
    assert report(tmp_path / "plain")["plan"]["fingerprint"] == body["plan"]["fingerprint"], "the pixels are the same"
    plain = json.loads((tmp_path / "plain/export/bundle.json").read_text())
    assert not {"decoder", "dct_scaled", "augment_on"} & plain["image"].keys(), "earlier versions read it"
    code, output = run(PYTHON, tmp_path / "two", *words, *NEW, NODE_DISK=str(tmp_path / "another"))
    assert code == 0, output
    assert "score: done before, skipped" in output, "where copies lie is no part of the result"
    assert "data: copying 2 files" in output

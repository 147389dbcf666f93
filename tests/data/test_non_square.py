"""Images that are higher than wide or wider than high: from the recipe to the bundle."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.nn import functional

import dist_prune as dp
from dist_prune.cli import main as cli
from dist_prune.config.data import Data
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.export import bundle, manifest
from tests.support import masks

SIZE = (20, 36)


def loader(source, augment: str = "none", mode: str = "squash") -> ImageLoader:
    channels = source.in_chans
    look = TransformConfig(SIZE, (0.0,) * channels, (1.0,) * channels, augment=augment, crop_mode=mode)  # type: ignore[arg-type]
    return ImageLoader(source, look, torch.device("cpu"))


@pytest.mark.parametrize("augment", ["none", "crop_flip", "resized_crop_flip"])
@pytest.mark.parametrize("mode", ["squash", "center", "border"])
def test_images_and_masks_have_the_height_and_the_width(tmp_path, augment, mode):
    masks.write(tmp_path, count=5)
    feed = loader(open_source("maskfolder", str(tmp_path), "train", True), augment, mode)
    (batch,) = feed.batches([np.arange(3)], (0, 1) if augment != "none" else None)
    assert feed.image_shape == (3, *SIZE)
    assert batch.images.shape == (3, 3, *SIZE)
    assert batch.labels.shape == (3, *SIZE)


def test_a_squashed_image_is_pillows_resize(tmp_path):
    draw = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    Image.fromarray(draw.integers(0, 256, (45, 64, 3), dtype=np.uint8)).save(tmp_path / "a" / "0.png")
    (batch,) = loader(open_source("images", str(tmp_path), "a", True)).batches([np.arange(1)])
    wanted = Image.open(tmp_path / "a" / "0.png").resize(SIZE[::-1], Image.Resampling.BILINEAR)
    assert (batch.images[0].permute(1, 2, 0) * 255 - torch.from_numpy(np.asarray(wanted).copy())).abs().max() < 1e-3


@pytest.mark.parametrize("augment", ["none", "resized_crop_flip"])
def test_arrays_are_resized_to_the_height_and_the_width(augment):
    source = open_source("digits", None, "", True)
    (batch,) = loader(source, augment).batches([np.arange(4)], (0, 0) if augment != "none" else None)
    assert batch.images.shape == (4, 1, *SIZE)
    if augment == "none":
        pixels = torch.from_numpy(source.images[:4]).permute(0, 3, 1, 2).float()  # type: ignore[index]
        wanted = functional.interpolate(pixels, SIZE, mode="bilinear", antialias=True) / 255
        assert torch.allclose(batch.images, wanted, atol=1e-6)


def test_the_key_takes_a_side_or_height_and_width():
    assert Data(source="images", image_size=[180, 240]).image_size == (180, 240)  # type: ignore[arg-type]
    assert Data(source="images", image_size=64).image_size == 64
    for wrong in ([180], [0, 4], [1, 2, 3], "a"):
        with pytest.raises(ValidationError):
            Data(source="images", image_size=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="resize_schedule: its sides are those of squares"):
        Data(source="images", image_size=[180, 240], resize_schedule={0: 64})  # type: ignore[arg-type]


def test_a_bundle_keeps_both_sides(tmp_path):
    torch.manual_seed(0)
    network = masks.Segmenter("tensor").eval()
    graph = dp.trace(network, (3, *SIZE))
    plan = dp.select(dp.score(network, graph, "l1", None), graph, target={"macs": 0.6})
    place = dp.save(dp.prune(network, plan), plan, tmp_path / "b", task="segmentation")
    read = bundle.read_bundle(place)
    assert read.shape == (3, *SIZE)
    assert read.body["outputs"]["logits"][1:] == list(SIZE)
    again = bundle.load(place, model=lambda: masks.Segmenter("tensor"), fold=True)
    assert again(torch.zeros(1, 3, *SIZE)).shape[-2:] == SIZE
    for wrong in ([20], [20, 0], 0, "20"):
        body = json.loads((place / bundle.MANIFEST).read_text())
        body["image"]["size"] = wrong
        with pytest.raises(Exception, match="image.size"):
            manifest.check(body, "file")


def test_a_network_of_squares_is_refused_before_work(tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (9, 7)).save(tmp_path / split / "0.png")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\ntask: {name: features}\nbackbone: {name: 'features:vit_tiny_patch16_224', kwargs: {img_size: 32}, "
        f"checkpoint: none.safetensors}}\ndata: {{source: images, root: {tmp_path}, image_size: [32, 48]}}\n"
        "method: {name: l1}\ntarget: {macs: 0.9}\nfinetune: {epochs: 0}\n"
    )
    assert cli.main(["check", "--assume", str(recipe)]) != 0
    assert "Build it for them: backbone.kwargs={img_size: [32, 48]}" in capsys.readouterr().err
    recipe.write_text(recipe.read_text().replace("img_size: 32", "img_size: [32, 48]"))
    assert cli.main(["check", "--assume", str(recipe)]) == 0
    assert "input 3x32x48" in capsys.readouterr().out

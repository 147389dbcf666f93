"""Resizes by torch: close to Pillow's on photographs, in the same place, and refused where they cannot be made."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dist_prune.config.data import Data
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.errors import PruneError

CPU, COUNT = torch.device("cpu"), 12
ZERO, STEP = (0.0,) * 3, (1 / 255,) * 3  # images come out on [0, 255]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Smooth and noisy photographs of several shapes, one of them grayscale, as a folder of classes."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for number in range(COUNT):
        rough = rng.integers(0, 256, (9 + number, 12 + 5 * (number % 3), 3), np.uint8)
        image = Image.fromarray(rough).resize((90 + 7 * number, 120 - 5 * number), Image.Resampling.BICUBIC)
        place = folder / "val" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        (image.convert("L") if number == 3 else image).save(place / f"{number:02d}.jpg", quality=92)
    return open_source("imagefolder", str(folder), "val", False)


def batch(source, key=None, **more) -> np.ndarray:
    look = TransformConfig(**{"size": 48, "crop": 0.875, "mean": ZERO, "std": STEP, **more})
    return next(ImageLoader(source, look, CPU).batches([np.arange(COUNT)], key)).images.numpy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize(
    ("key", "more"),
    [
        (None, {}),
        (None, {"crop_mode": "squash"}),
        (None, {"crop_mode": "border", "mean": (0.1, 0.5, 0.9)}),
        (None, {"size": (40, 56)}),
        ((0, 1), {"augment": "resized_crop_flip"}),
        ((3, 2), {"augment": "crop_flip"}),
    ],
)
def test_pixels_are_those_of_pillow_but_for_rounding(photographs, interpolation, key, more):
    more = more | {"interpolation": interpolation}
    by_pillow, by_torch = (batch(photographs, key, resizer=name, **more) for name in ("pillow", "torch"))
    apart = np.abs(by_pillow - by_torch)
    if interpolation == "nearest":
        assert (apart > 0).mean() < 0.05, "the same neighbour, but where two are equally near"
    else:
        assert apart.mean() < 0.6 and apart.max() <= 16


@pytest.mark.parametrize("decoder", ["pillow", "torchvision", "simplejpeg"])
def test_every_decoder_gives_the_same(photographs, decoder):
    if decoder == "simplejpeg":
        pytest.importorskip("simplejpeg")
    for key, more in ((None, {}), ((0, 4), {"augment": "resized_crop_flip"})):
        expected = batch(photographs, key, resizer="torch", **more)
        assert np.array_equal(batch(photographs, key, resizer="torch", decoder=decoder, **more), expected)


def test_real_photographs_are_two_steps_apart_at_most(data):
    source = open_source("imagefolder", str(data / "imagenet_1000"), "val", False)
    looks = [TransformConfig(224, ZERO, STEP, 0.95, resizer=name) for name in ("pillow", "torch")]
    one, other = (next(ImageLoader(source, look, CPU).batches([np.arange(24)])).images for look in looks)
    apart = (one - other).abs()
    assert apart.max() <= 2 and 0 < (apart > 0).float().mean() < 0.05


def test_what_is_refused(photographs, tmp_path, ffcv):
    with pytest.raises(ValueError, match="data.resizer is for image files .*data.source is digits"):
        Data(source="digits", resizer="torch")
    with pytest.raises(ValueError, match="masks are resized by Pillow"):
        Data(source="maskfolder", root="x", resizer="torch")
    with pytest.raises(ValueError, match="windows of whole pixels, and those of data.dct_scaled have fractions"):
        Data(source="tar", root="x", resizer="torch", dct_scaled=True)
    from dist_prune.cli.main import main
    from dist_prune.data.ffcv.backend import open_beton

    content = io.BytesIO()
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(content, "JPEG")
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "1.jpg").write_bytes(content.getvalue())
    assert main(["make-ffcv", "--source", str(tmp_path), "--split", "train", "--write-mode", "raw"]) == 0
    with pytest.raises(PruneError, match="data.resizer: the ffcv backend resizes by itself"):
        ImageLoader(open_beton(tmp_path / "train.beton"), TransformConfig(16, ZERO, STEP, resizer="torch"), CPU)

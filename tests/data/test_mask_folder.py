"""Images with masks: they move together under the same draw, and what cannot be used is refused before work."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from dist_prune.data.mask_folder import VOID
from dist_prune.errors import PruneError
from tests.support import masks


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def classes_seen(images: torch.Tensor) -> torch.Tensor:
    """The class of each pixel by its colour, 255 where there is none."""
    red = ((images[:, 0] * 0.4 + 0.3) * 255).round().long()
    assert bool((red % masks.STEP == 0).all())
    return torch.where(red == 0, VOID, red // masks.STEP - 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip", "resized_crop_flip"])
def test_a_mask_moves_with_its_image(tmp_path, augment, workers):
    """Resized by the nearest pixel as well, an image tells its mask: every crop, flip and resize was the same."""
    feed = masks.feed(masks.write(tmp_path), interpolation="nearest", augment=augment, scale=(0.2, 1.0))
    feed.workers = feed._image_backend.workers = workers  # type: ignore[attr-defined]
    moved = set()
    for epoch in range(3):
        for batch in feed.batches([np.arange(12), np.arange(12, 23)], (5, epoch)):
            assert batch.labels.shape == (len(batch.ids), masks.SIDE, masks.SIDE)
            assert batch.labels.dtype == torch.int64
            assert torch.equal(batch.labels, classes_seen(batch.images))
            moved.add(batch.labels.numpy().tobytes())
    feed.close()
    assert len(moved) == (2 if augment == "none" else 6)


def test_the_evaluation_transform_keeps_every_class_and_no_value_between(tmp_path):
    feed = masks.feed(masks.write(tmp_path))
    (batch,) = feed.batches([np.arange(23)])
    assert set(batch.labels.unique().tolist()) == {0, 1, 2, 3, VOID}


def test_masks_and_their_pixels_are_counted(tmp_path):
    source = masks.source(masks.write(tmp_path))
    counts = np.zeros(256, dtype=np.int64)
    for number in range(masks.IMAGES):
        counts += np.bincount(np.asarray(Image.open(source.fetch_mask(number))).ravel(), minlength=256)
    assert source.pixels == (*counts[:4].tolist(), int(counts[VOID]))
    assert masks.source(tmp_path).pixels == source.pixels  # from the cache


def damage(root, name):
    image, mask = root / "train/images/007.png", root / "train/labels/007.png"
    if name == "no mask":
        mask.unlink()
    elif name == "another size":
        Image.fromarray(np.zeros((20, 23), np.uint8)).save(mask)
    elif name == "class out of range":
        pixels = np.asarray(Image.open(mask)).copy()
        pixels[3, 4] = 4
        Image.fromarray(pixels).save(mask)
    elif name == "colours":
        Image.open(image).save(mask)
    elif name == "damaged":
        mask.write_bytes(mask.read_bytes()[:40])
    elif name == "no classes":
        (root / "classes.txt").unlink()
    elif name == "a class twice":
        (root / "classes.txt").write_text("a\nb\na\n")
    elif name == "no folder":
        (root / "train/labels").rename(root / "train/other")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no mask", r"1 of 23 images in .* have no mask in .*labels: 007.png"),
        ("another size", r"the mask 007.png has 23x20 pixels, its image 24x20"),
        ("class out of range", r"the mask 007.png has the value 4, and class numbers are 0 to 3"),
        ("colours", r"007.png has the mode RGB; a mask is an 8-bit gray or palette image"),
        ("damaged", r"1 of 23 masks .* cannot be used: 007.png"),
        ("no classes", r"there is no .*classes.txt, the names of the classes"),
        ("a class twice", r"a stands there twice"),
        ("no folder", r"train has no folder labels or masks"),
    ],
)
def test_what_cannot_be_used_is_refused_before_work(tmp_path, name, text):
    masks.write(tmp_path)
    masks.source(tmp_path)  # sound, and in the cache
    damage(tmp_path, name)
    with pytest.raises(PruneError, match=text):
        masks.source(tmp_path)


def test_a_missing_split_names_those_that_there_are(tmp_path):
    masks.write(tmp_path, splits=("train", "test"))
    with pytest.raises(
        PruneError, match=r"data.eval_split: there is no folder .*val.* Splits with images: test, train"
    ):
        masks.source(tmp_path, train=False)


def test_policies_that_would_leave_masks_behind_are_refused(tmp_path):
    with pytest.raises(PruneError, match=r"data.auto_augment: policies turn and shear images without their masks"):
        masks.feed(masks.write(tmp_path), auto_augment="rand-m5")


def test_the_real_masks_of_camvid(data):
    """The shares of classes that the data set's description states."""
    source = masks.open_masks(masks.SplitSpec("maskfolder", str(data / "camvid"), "train", True))
    shares = {
        name: count / sum(source.pixels) for name, count in zip((*source.classes, "void"), source.pixels, strict=True)
    }
    assert len(source.names) == 367
    assert len(source.classes) == 11
    found = {name: round(100 * shares[name], 2) for name in ("Road", "Building", "void")}
    assert re.match(r"Bicyclist", source.classes[-1])
    assert found == {"Road": pytest.approx(31.8, abs=0.05), "Building": pytest.approx(23.2, abs=0.05), "void": 3.96}

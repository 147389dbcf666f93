"""Boxes lie where their pixels lie, whatever the transform; the loader moves both by the same draw."""

import numpy as np
import pytest
import torch
from PIL import Image

from dist_prune.data.box_source import AnnotatedImage, make_source
from dist_prune.data.box_transform import VISIBLE, move_boxes
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.errors import PruneError
from tests.support import boxes

SIDE = 60


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory):
    """Images of several sizes, black with one white rectangle, whose box is known."""
    folder, rng, made = tmp_path_factory.mktemp("rectangles"), np.random.default_rng(0), []
    for number in range(24):
        width, height = (int(side) for side in rng.integers(50, 160, 2))
        x0, y0 = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
        x1, y1 = int(rng.integers(x0 + 20, width + 1)), int(rng.integers(y0 + 20, height + 1))
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[y0:y1, x0:x1] = 255
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        made.append(AnnotatedImage(folder / f"{number:02}.png", ((0.0, x0, y0, x1, y1, 0.0),)))
    return make_source(made, ["white"], folder / "boxes.json", lambda text: None)


LOOKS = [
    {"crop_mode": "squash"},
    {"crop_mode": "squash", "crop": 0.75},
    {"crop_mode": "center"},
    {"crop_mode": "center", "crop": 0.8},
    {"crop_mode": "border"},
    {"crop_mode": "border", "crop": 0.8},
    {"crop_mode": "squash", "augment": "crop"},
    {"crop_mode": "center", "augment": "crop_flip", "padding": 11},
    {"crop_mode": "border", "augment": "crop_flip"},
    {"augment": "resized_crop_flip", "scale": (0.3, 1.0)},
]


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: "-".join(map(str, look.values())))
def test_a_box_lies_where_its_pixels_lie(rectangles, look):
    transform = TransformConfig(SIDE, (0.0,) * 3, (1.0,) * 3, **look)
    loader = ImageLoader(rectangles, transform, torch.device("cpu"))
    augment = (3, 1) if "augment" in look else None
    (batch,) = loader.batches([np.arange(24)], augment)
    seen = 0
    for image, (row,) in zip(batch.images, batch.labels.tolist(), strict=True):
        white = image[0] > 0.5
        if row[0] < 0:  # so little is left that the box was dropped
            assert float(white.float().mean()) < 0.6
            continue
        seen += 1
        columns, rows = torch.nonzero(white.any(0)).flatten(), torch.nonzero(white.any(1)).flatten()
        found = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        assert np.abs(np.array(found) - row[1:5]).max() <= 1.01, (found, row)
    assert seen > 15


def test_what_a_crop_leaves_decides_whether_a_box_stays():
    """Sizes 100x100 to a window of 50: boxes are cut at its edge; those with less than a quarter left are dropped."""
    transform = TransformConfig(50, (0.0,), (1.0,), crop=0.5)  # resized to 100, the central 50 are left
    wanted = [[0, 0, 0, 10, 20], [0, 20, 30, 40, 50], [0, 20, 30, 26, 50], [0, 30, 30, 31, 31]]
    table = torch.tensor([[[*row, 0.0] for row in wanted]])
    moved = move_boxes(table, np.array([[100, 100]]), np.arange(1), transform, None, 50)[0]
    assert VISIBLE == 0.25
    assert moved.tolist() == [
        [-1, 0, 0, 0, 0, 0],  # outside
        [0, 0, 5, 15, 25, 0],  # three quarters are left
        [-1, 0, 0, 0, 0, 0],  # a sixth is left
        [0, 5, 5, 6, 6, 0],  # whole, however small
    ]


def test_boxes_depend_on_the_image_alone(tmp_path):
    root = boxes.write(tmp_path)
    loader = boxes.feed(root, augment="resized_crop_flip", scale=(0.3, 1.0))
    (whole,) = loader.batches([np.arange(boxes.IMAGES)], (0, 5))
    for ids in (np.array([7]), np.array([9, 2, 3])):
        (part,) = loader.batches([ids], (0, 5))
        assert torch.equal(part.labels, whole.labels[torch.from_numpy(ids)])
        assert torch.equal(part.images, whole.images[torch.from_numpy(ids)])
    (other,) = loader.batches([np.arange(boxes.IMAGES)], (0, 6))
    assert not torch.equal(other.labels, whole.labels)


def test_policies_that_turn_images_are_refused(tmp_path):
    with pytest.raises(PruneError, match=r"data\.auto_augment: policies turn and shear images without their boxes"):
        boxes.feed(boxes.write(tmp_path), auto_augment="rand-m9")

"""Augmentation of whole batches on a GPU: the host form's pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig

pytestmark = pytest.mark.gpu
CPU, COUNT = torch.device("cpu"), 12


@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("imagefolder", {"augment": "crop_flip"}),
        ("imagefolder", {"augment": "crop_flip", "erasing": 0.7}),
        ("npz", {"augment": "resized_crop_flip", "erasing": 0.7, "erasing_mode": "rand"}),
        ("npz", {"augment": "crop", "erasing": 0.7, "erasing_mode": "const"}),
    ],
)
def test_the_pixels_of_the_host(form, more, gpu, tmp_path):
    rng, labels = np.random.default_rng(0), np.arange(COUNT) % 3
    arrays = rng.integers(0, 256, (COUNT, 40, 40, 3), np.uint8)
    np.savez(tmp_path / "arrays.npz", x_train=arrays, y_train=labels, x_test=arrays, y_test=labels)
    for number, image in enumerate(arrays):
        folder = tmp_path / "train" / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[: 30 + number]).save(folder / f"{number:02}.jpg")
    source = open_source(form, str(tmp_path / ("arrays.npz" if form == "npz" else "")), "train", True)
    seen = []
    for device, on in ((CPU, "host"), (gpu, "device")):
        look = TransformConfig(32, (0.0,) * 3, (1 / 255,) * 3, augment_on=on, **more)
        feed = ImageLoader(source, look, device, backend="torch")
        seen.append(next(feed.batches([np.arange(COUNT)], (0, 1))).images.cpu())
    assert (seen[0] - seen[1]).abs().max() <= 1

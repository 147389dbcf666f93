"""Small images with masks whose colours tell their classes, and a small segmenter with transposed convolutions."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.mask_folder import MaskFolderSource, open_masks
from dist_prune.data.random_access import SplitSpec

CLASSES, SIDE, IMAGES = 4, 16, 23
STEP = 40  # a pixel of class c has the red value (c + 1) * STEP; 0, which padding adds, stands for void


def write(root: Path, count: int = IMAGES, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """``count`` images of 24x20 pixels per split, of rectangles in the colours of their classes and some void."""
    for number, split in enumerate(splits):
        rng = np.random.default_rng(number)
        for folder in ("images", "labels"):
            (root / split / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            mask = np.full((20, 24), index % CLASSES, dtype=np.uint8)
            for value in (*range(CLASSES), 255):
                top, left = rng.integers(0, 14, 2)
                mask[top : top + 6, left : left + 8] = value
            image = np.zeros((20, 24, 3), dtype=np.uint8)
            image[..., 0] = np.where(mask == 255, 0, (mask + 1) * STEP)
            image[..., 1] = rng.integers(0, 60, mask.shape)
            Image.fromarray(image).save(root / split / "images" / f"{index:03}.png")
            Image.fromarray(mask).save(root / split / "labels" / f"{index:03}.png")
    (root / "classes.txt").write_text("road\nsky\ntree\ncar\n")
    return root


def source(root: Path, train: bool = True) -> MaskFolderSource:
    return open_masks(SplitSpec("maskfolder", str(root), "train" if train else "val", train))


def feed(root: Path, train: bool = True, dtype: torch.dtype = torch.float64, **look: object) -> ImageLoader:
    shape: dict[str, object] = {"crop_mode": "squash", **look}
    transform = TransformConfig(SIDE, (0.3,) * 3, (0.4,) * 3, **shape)  # type: ignore[arg-type]
    return ImageLoader(source(root, train), transform, torch.device("cpu"), dtype=dtype)


class Segmenter(nn.Module):
    """Down twice, up twice by transposed convolutions (one grouped, one with output padding), a skip by concatenation.

    Args:
        form: ``tensor``, ``dict`` (with an auxiliary head), ``tuple`` or ``list``.
    """

    def __init__(self, form: str = "dict"):
        super().__init__()
        self.form = form
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.deep = nn.Conv2d(8, 12, 3, 2, padding=1), nn.Conv2d(12, 16, 3, 2, padding=1)
        self.up = nn.ConvTranspose2d(16, 12, 3, stride=2, padding=1, output_padding=1, groups=4)
        self.mix = nn.Conv2d(24, 12, 1)
        self.last = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.head, self.aux = nn.Conv2d(6, CLASSES, 1), nn.Conv2d(12, CLASSES, 1)

    def forward(self, images: Tensor) -> object:
        x = torch.relu(self.norm(self.stem(images)))
        skip = torch.relu(self.down(x))
        y = torch.relu(self.up(torch.relu(self.deep(skip))))
        y = torch.relu(self.mix(torch.cat([y, skip], 1)))
        out = self.head(torch.relu(self.last(y)))
        if self.form == "tensor":
            return out
        if self.form == "dict":
            return {"out": out, "aux": self.aux(y)}
        return (out, y.mean((2, 3))) if self.form == "tuple" else [out, y.mean((2, 3))]


def network(form: str = "dict", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Segmenter(form).double()
    model.norm.running_mean.normal_(std=0.3)  # type: ignore[union-attr]
    model.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return model.eval()

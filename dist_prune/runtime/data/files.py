"""The torch backend: image files decoded and transformed one by one in DataLoader workers."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from dist_prune.errors import PruneError
from dist_prune.runtime.data.dealing import draws
from dist_prune.runtime.data.sources import FolderSource
from dist_prune.runtime.data.supply import Look, Moment
from dist_prune.runtime.stopping import deafen


class FileSupplier:
    """Images of a ``FolderSource``."""

    allowed: tuple[str, ...] = ("none", "resized_crop_flip")

    def __init__(self, source: FolderSource, workers: int):
        self.source, self.workers = source, workers
        self.skipped: dict[int, str] = {}

    def pixels(
        self, dealt: Sequence[np.ndarray], look: Look, augment: Moment | None, size: int
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """See Supplier."""
        loader = DataLoader(
            _Files(self.source, look, augment, size),
            batch_sampler=_Lists(dealt),
            num_workers=self.workers if len(dealt) > 1 else 0,
            collate_fn=torch.stack,
            worker_init_fn=deafen,
        )
        yield from zip(dealt, loader, strict=True)


class _Lists:
    """A batch sampler that hands out fixed lists of ids."""

    def __init__(self, lists: Sequence[np.ndarray]):
        self.lists = lists

    def __iter__(self) -> Iterator[list[int]]:
        return iter([ids.tolist() for ids in self.lists])

    def __len__(self) -> int:
        return len(self.lists)


class _Files(Dataset[Tensor]):
    """Decoded, cropped uint8 images (C, size, size) by sample id."""

    def __init__(self, source: FolderSource, look: Look, augment: Moment | None, size: int):
        self.source, self.look, self.augment, self.size = source, look, augment, size

    def __getitem__(self, index: int) -> Tensor:
        path = self.source.paths[index]
        try:
            with Image.open(path) as file:
                image: Any = file.convert("RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise PruneError(f"sample {index}: the image {path} cannot be decoded: {error}") from error
        mode = InterpolationMode(self.look.interpolation)
        size = [self.size, self.size]
        if self.augment is not None and self.look.augment == "resized_crop_flip":
            chance = draws(*self.augment, np.array([index]), 5)[0].tolist()
            image = vision.resized_crop(image, *_window(image.size, chance), size, mode)
            image = vision.hflip(image) if chance[4] < 0.5 else image
        else:
            short = math.floor(self.size / self.look.crop)
            image = vision.center_crop(vision.resize(image, [short], mode), size)
        return vision.pil_to_tensor(image)


def _window(size: tuple[int, int], chance: list[float]) -> tuple[int, int, int, int]:
    """A crop of 8 to 100 % of the area and aspect 3/4 to 4/3 (top, left, height, width), as in Inception training."""
    width, height = size
    area = width * height * (0.08 + 0.92 * chance[0])
    aspect = math.exp(math.log(3 / 4) + chance[1] * (math.log(4 / 3) - math.log(3 / 4)))
    w = min(width, max(1, round(math.sqrt(area * aspect))))
    h = min(height, max(1, round(math.sqrt(area / aspect))))
    return int(chance[2] * (height - h + 1)), int(chance[3] * (width - w + 1)), h, w

"""From sample ids to batches on the device: one tail (float, augment, normalise) behind every source."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from dist_prune.errors import PruneError
from dist_prune.runtime.data.dealing import draws
from dist_prune.runtime.data.sources import ArraySource, FolderSource
from dist_prune.runtime.stopping import deafen


@dataclass(frozen=True)
class Batch:
    """``images`` (n, C, H, W) float, normalised; ``labels`` (n,); ``ids`` (n,) sample ids, on the CPU."""

    images: Tensor
    labels: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Look:
    """What images look like to the network."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0
    interpolation: str = "bilinear"
    augment: Literal["none", "crop", "crop_flip", "resized_crop_flip"] = "none"


@dataclass
class Feed:
    """Batches of one split, in any order asked for."""

    source: ArraySource | FolderSource
    look: Look
    device: torch.device
    workers: int = 0
    dtype: torch.dtype = torch.float32
    _scale: tuple[Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self):
        memory = isinstance(self.source, ArraySource)
        allowed = ("none", "crop", "crop_flip") if memory else ("none", "resized_crop_flip")
        if self.look.augment not in allowed:
            raise PruneError(
                f"data.augment: {self.look.augment!r} does not go with {'arrays' if memory else 'image files'}; "
                f"allowed: {', '.join(allowed)}"
            )
        mean = torch.tensor(self.look.mean, dtype=self.dtype, device=self.device).view(1, -1, 1, 1)
        std = torch.tensor(self.look.std, dtype=self.dtype, device=self.device).view(1, -1, 1, 1)
        self._scale = (255 * mean, 255 * std)

    def __len__(self) -> int:
        return len(self.source.labels)

    def batches(self, dealt: Iterable[np.ndarray], augment: tuple[int, int] | None = None) -> Iterator[Batch]:
        """Batches for lists of ids, in their order.

        Args:
            dealt: the ids of each batch.
            augment: (seed, epoch) for training images; None for the evaluation look.
        """
        labels = torch.from_numpy(self.source.labels)
        for ids, pixels in self._pixels(dealt, augment):
            images = (pixels.to(self.device, non_blocking=True).to(self.dtype) - self._scale[0]) / self._scale[1]
            index = torch.from_numpy(np.ascontiguousarray(ids))
            yield Batch(images, labels[index].to(self.device, non_blocking=True), index)

    def _pixels(
        self, dealt: Iterable[np.ndarray], augment: tuple[int, int] | None
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        if isinstance(self.source, ArraySource):
            for ids in dealt:
                yield ids, self._from_memory(ids, augment)
            return
        lists = list(dealt)
        files = _Files(self.source, self.look, augment)
        loader = DataLoader(
            files,
            batch_sampler=_Lists(lists),
            num_workers=self.workers if len(lists) > 1 else 0,
            collate_fn=torch.stack,
            worker_init_fn=deafen,
        )
        yield from zip(lists, loader, strict=True)

    def _from_memory(self, ids: np.ndarray, augment: tuple[int, int] | None) -> Tensor:
        assert isinstance(self.source, ArraySource)
        pixels = self.source.take(ids)
        if augment is not None and self.look.augment != "none":
            pixels = _crop(pixels, draws(*augment, ids, 3), flip=self.look.augment != "crop")
        if pixels.shape[-2:] != (self.look.size, self.look.size):
            wanted = (self.look.size, self.look.size)
            pixels = functional.interpolate(pixels.float(), wanted, mode="bilinear", antialias=True)
        return pixels


def _crop(pixels: Tensor, chance: Tensor, flip: bool) -> Tensor:
    """Pad by an eighth of the side (4 for 32), crop at a place drawn per image, flip every second one if asked.

    Args:
        pixels: (n, C, H, W).
        chance: (n, 3) uniform numbers: row, column, flip.
    """
    n, _, height, width = pixels.shape
    pad = max(1, height // 8)
    padded = functional.pad(pixels, (pad,) * 4)
    places = (chance[:, :2] * (2 * pad + 1)).long()
    rows = places[:, :1] + torch.arange(height)
    columns = places[:, 1:] + torch.arange(width)
    columns = torch.where(chance[:, 2:] < 0.5, columns.flip(1), columns) if flip else columns
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class _Lists:
    """A batch sampler that hands out fixed lists of ids."""

    def __init__(self, lists: list[np.ndarray]):
        self.lists = lists

    def __iter__(self) -> Iterator[list[int]]:
        return iter([ids.tolist() for ids in self.lists])

    def __len__(self) -> int:
        return len(self.lists)


class _Files(Dataset[Tensor]):
    """Decoded, cropped uint8 images (C, size, size) by sample id."""

    def __init__(self, source: FolderSource, look: Look, augment: tuple[int, int] | None):
        self.source, self.look, self.augment = source, look, augment

    def __getitem__(self, index: int) -> Tensor:
        path = self.source.paths[index]
        try:
            with Image.open(path) as file:
                image: Any = file.convert("RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise PruneError(f"sample {index}: the image {path} cannot be decoded: {error}") from error
        mode = InterpolationMode(self.look.interpolation)
        size = [self.look.size, self.look.size]
        if self.augment is not None and self.look.augment == "resized_crop_flip":
            chance = draws(*self.augment, np.array([index]), 5)[0].tolist()
            image = vision.resized_crop(image, *_window(image.size, chance), size, mode)
            image = vision.hflip(image) if chance[4] < 0.5 else image
        else:
            short = math.floor(self.look.size / self.look.crop)
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

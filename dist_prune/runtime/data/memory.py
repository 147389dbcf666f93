"""The backend for arrays in memory: crop, flip and resize as tensor operations on whole batches."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dist_prune.runtime.data.dealing import draws
from dist_prune.runtime.data.sources import ArraySource
from dist_prune.runtime.data.supply import Look, Moment


class MemorySupplier:
    """Images of an ``ArraySource``, kept as uint8 on the device."""

    allowed: tuple[str, ...] = ("none", "crop", "crop_flip")

    def __init__(self, source: ArraySource, device: torch.device):
        self.skipped: dict[int, str] = {}
        self.images = torch.from_numpy(source.images).permute(0, 3, 1, 2).to(device)

    def pixels(
        self, dealt: Sequence[np.ndarray], look: Look, augment: Moment | None, size: int
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """See Supplier."""
        for ids in dealt:
            pixels = self.images[torch.from_numpy(np.ascontiguousarray(ids)).to(self.images.device)]
            if augment is not None and look.augment != "none":
                pixels = _crop(pixels, draws(*augment, ids, 3).to(pixels.device), flip=look.augment != "crop")
            if pixels.shape[-2:] != (size, size):
                pixels = functional.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True)
            yield ids, pixels


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
    rows = places[:, :1] + torch.arange(height, device=pixels.device)
    columns = places[:, 1:] + torch.arange(width, device=pixels.device)
    columns = torch.where(chance[:, 2:] < 0.5, columns.flip(1), columns) if flip else columns
    images = torch.arange(n, device=pixels.device)
    return padded[images[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

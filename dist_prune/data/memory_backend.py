"""The backend for arrays in memory: crop, flip and resize as tensor operations on whole batches."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dist_prune.data import augment as augmentation
from dist_prune.data.random_access import ImageSource
from dist_prune.data.timm_transforms import auto_augment_policy
from dist_prune.data.transform_config import AugmentKey, TransformConfig

DEVICE_SHARE = 0.25  # of the free GPU memory: a larger data set stays in the host's memory


class MemoryBackend:
    """Images of a source whose pixels are in memory, kept as uint8 on the device."""

    name = "memory"
    allowed: tuple[str, ...] = ("none", "crop", "crop_flip", "resized_crop_flip")
    policies = True
    skips = False

    def __init__(self, source: ImageSource, device: torch.device):
        assert source.images is not None  # those that list this backend have them
        images = torch.from_numpy(source.images)  # (n, H, W, C)
        room = torch.cuda.mem_get_info(device)[0] * DEVICE_SHARE if device.type == "cuda" else 0
        self.images = images.to(device) if images.nbytes <= room else images

    def pixels(
        self, dealt: Sequence[np.ndarray], transform: TransformConfig, augment: AugmentKey | None, size: int
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """See ImageBackend."""
        for ids in dealt:
            index = torch.from_numpy(np.ascontiguousarray(ids)).to(self.images.device, non_blocking=True)
            pixels = self.images.index_select(0, index).permute(0, 3, 1, 2)
            yield ids, render(pixels, ids, transform, augment, size)

    def close(self) -> None:
        """Nothing to let go of."""


def render(
    pixels: Tensor, ids: np.ndarray, transform: TransformConfig, augment: AugmentKey | None, size: int
) -> Tensor:
    """Images (n, C, H, W) uint8 as the network sees them, but for the normalisation: (n, C, size, size)."""
    kind = transform.augment if augment is not None else "none"
    if augment is not None and kind == "resized_crop_flip":
        pixels = augmentation.resized_windows(pixels, augment, ids, transform, size)
    elif pixels.shape[-2:] != (size, size):
        pixels = functional.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True)
    if augment is not None and kind in ("crop", "crop_flip"):
        pixels = augmentation.shift_and_flip(pixels, augment, ids, kind == "crop_flip", transform.padding)
    if augment is None or not transform.auto_augment:
        return pixels
    whole = pixels.round().clamp(0, 255).to(torch.uint8) if pixels.is_floating_point() else pixels
    found = auto_augment_policy(transform, size).each(
        whole.permute(0, 2, 3, 1).cpu().numpy(), augmentation.numbers(augment, ids)
    )
    return torch.from_numpy(found).permute(0, 3, 1, 2).to(pixels.device)

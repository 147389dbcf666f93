"""The memory backend: crop, flip and resize of whole batches as tensor operations."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dist_prune.data import augment as augmentation
from dist_prune.data.random_access import ImageSource
from dist_prune.data.timm_transforms import auto_augment_policy
from dist_prune.data.transform_config import AugmentKey, Size, TransformConfig, sides_of

DEVICE_SHARE = 0.25  # of the free GPU memory; a larger data set stays in the memory of the host


class MemoryBackend:
    """Images whose pixels are in memory, kept as uint8 on the device if a quarter of its free memory holds them.

    Args:
        source: a split with ``images``.
        device: where batches are needed.
    """

    name = "memory"
    allowed: tuple[str, ...] = ("none", "crop", "crop_flip", "resized_crop_flip")
    policies = True
    skips = False

    def __init__(self, source: ImageSource, device: torch.device):
        assert source.images is not None  # sources that list this backend have them
        images = torch.from_numpy(source.images)  # (n, H, W, C)
        room = torch.cuda.mem_get_info(device)[0] * DEVICE_SHARE if device.type == "cuda" else 0
        self.images = images.to(device) if images.nbytes <= room else images

    def pixels(
        self, id_lists: Sequence[np.ndarray], transform: TransformConfig, augment: AugmentKey | None, size: Size
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Load pixels of one split by sample id. See ``ImageBackend.pixels``."""
        for ids in id_lists:
            index = torch.from_numpy(np.ascontiguousarray(ids)).to(self.images.device, non_blocking=True)
            pixels = self.images.index_select(0, index).permute(0, 3, 1, 2)
            deferred = transform.is_deferred(augment)
            yield ids, pixels if deferred else transform_batch(pixels, ids, transform, augment, size)

    def close(self) -> None:
        """Do nothing: there are no workers."""


def transform_batch(
    pixels: Tensor, ids: np.ndarray, transform: TransformConfig, augment: AugmentKey | None, size: Size
) -> Tensor:
    """Apply the transform, all but normalisation and random erasing, to a batch of whole images.

    Args:
        pixels: (n, C, H, W) uint8, on any device.
        ids: (n,) int64 sample ids.
        transform: geometry and auto-augment policy.
        augment: (seed, epoch) for training images; None for the evaluation transform, which resizes alone.
        size: side of the result in pixels, or (height, width).

    Returns:
        (n, C, height, width) on [0, 255], on the same device: uint8, or float32 after a resize without a random
        window and without a policy.
    """
    geometry = transform.augment if augment is not None else "none"
    if augment is not None and geometry == "resized_crop_flip":
        pixels = augmentation.resize_windows(pixels, augment, ids, transform, size)
    elif pixels.shape[-2:] != sides_of(size):
        pixels = functional.interpolate(pixels.float(), sides_of(size), mode="bilinear", antialias=True)
    if augment is not None and geometry in ("crop", "crop_flip"):
        pixels = augmentation.shift_and_flip(pixels, augment, ids, geometry == "crop_flip", transform.padding)
    if augment is None or not transform.auto_augment:
        return pixels
    rounded = pixels.round().clamp(0, 255).to(torch.uint8) if pixels.is_floating_point() else pixels
    augmented = auto_augment_policy(transform, size).augment_batch(
        rounded.permute(0, 2, 3, 1).cpu().numpy(), augmentation.policy_seeds(augment, ids)
    )
    return torch.from_numpy(augmented).permute(0, 3, 1, 2).to(pixels.device)

"""The interface of image backends, and the transform from stored images to the input of a network."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

Augment = Literal["none", "crop", "crop_flip", "resized_crop_flip"]
Size = int | tuple[int, int]  # side of a square in pixels, or (height, width)
AugmentKey = tuple[int, int]  # (seed, epoch) of training images; with the sample id it decides every random number


@dataclass(frozen=True)
class TransformConfig:
    """Transform from stored images to the input of a network.

    Attributes:
        size: of the input for scoring and evaluation, and for training without a schedule: side in pixels, or (height,
            width).
        mean: per channel, on [0, 1].
        std: per channel, on [0, 1].
        crop: fraction of the resized image that the centre crop keeps (timm's crop_pct).
        interpolation: of the resize, in timm's words.
        augment: geometry of training images. ``crop`` pads by an eighth and crops at a random position, ``crop_flip``
            also mirrors half of them, ``resized_crop_flip`` resizes a random window (Szegedy et al. 2015).
        crop_mode: timm's crop_mode.
        exif: turn images upright by their EXIF orientation.
        scale: (lowest, highest) fraction of the area in that window.
        ratio: (lowest, highest) aspect ratio of that window.
        auto_augment: timm's configuration string of RandAugment, AutoAugment or AugMix.
        erasing: probability of random erasing (Zhong et al. 2017).
        erasing_mode: its fill: timm's const, rand or pixel.
        schedule: (first epoch, side) pairs, ascending: progressive resizing of training images.
        padding: pixels by which ``crop`` and ``crop_flip`` pad; None: an eighth of the side.
        decoder: the recipe's ``data.decoder``.
        dct_scaled: decode JPEG files at a fraction of their size where the resize needs no more.
        augment_on: ``host``, or ``device``: geometry of training images on whole batches there.
        resizer: the recipe's ``data.resizer``.
    """

    size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0
    interpolation: str = "bilinear"
    augment: Augment = "none"
    crop_mode: str = "center"
    exif: bool = True
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    auto_augment: str | None = None
    erasing: float = 0.0
    erasing_mode: str = "pixel"
    schedule: tuple[tuple[int, int], ...] = ()
    padding: int | None = None
    decoder: str = "pillow"
    dct_scaled: bool = False
    augment_on: str = "host"
    resizer: str = "pillow"

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) of the input in pixels."""
        return sides_of(self.size)

    def size_at(self, augment_key: AugmentKey | None) -> Size:
        """Size of the images: side in pixels, or (height, width).

        Args:
            augment_key: (seed, epoch) of training images, whose side follows ``schedule``; None: ``size``.
        """
        reached_sizes = [size for epoch, size in self.schedule if augment_key is not None and epoch <= augment_key[1]]
        return reached_sizes[-1] if reached_sizes else self.size

    def is_deferred(self, augment_key: AugmentKey | None) -> bool:
        """Whether the image loader augments the batch on its device, so that backends deliver it before that.

        Args:
            augment_key: (seed, epoch) of training images; None: evaluation, which augments nothing.
        """
        return augment_key is not None and self.augment_on == "device"


def sides_of(size: Size) -> tuple[int, int]:
    """(height, width) in pixels of a size."""
    return (size, size) if isinstance(size, int) else size


class ImageBackend(Protocol):
    """Pixels of one split by sample id, in any order.

    Attributes:
        name: for messages.
        allowed: the values of ``data.augment`` that it supports.
        policies: whether it supports ``data.auto_augment``.
        skips: whether it may leave out images that cannot be read (``data.on_error: skip``).
    """

    name: str
    allowed: tuple[str, ...]
    policies: bool
    skips: bool

    def pixels(
        self, id_lists: Sequence[np.ndarray], transform: TransformConfig, augment: AugmentKey | None, size: Size
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Load pixels, one item for each list of ids, in the order of the lists.

        Args:
            id_lists: (n,) int64 sample ids of each batch.
            transform: of the images. Normalisation and random erasing are left to the image loader, and with
                ``transform.is_deferred(augment)`` all of the augmentation; then arrays come in their stored size.
            augment: (seed, epoch) for training images; None for the evaluation transform.
            size: side of square images in pixels, or (height, width).

        Yields:
            (the ids delivered, pixels (n, C, height, width) on [0, 255], uint8 or float, on the CPU or on the device).
            The pixels of an id depend on nothing but the id, ``transform``, ``augment`` and ``size``. Closing the
            iterator early frees its workers and threads.

        Raises:
            PruneError: an image cannot be read and may not be left out, or the workers died.
        """
        ...

    def close(self) -> None:
        """End workers and threads that wait for the next epoch."""
        ...

"""What every backend delivers, and what images look like to the network."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

Augment = Literal["none", "crop", "crop_flip", "resized_crop_flip"]
AugmentKey = tuple[int, int]  # (seed, epoch) of training images: with the sample id it decides every random number


@dataclass(frozen=True)
class TransformConfig:
    """What images look like to the network.

    Attributes:
        size: side of the square input when scoring and evaluating, and of training images without a schedule.
        mean, std: per channel, on [0, 1].
        crop, crop_mode, interpolation: how image files become squares (timm's crop_pct, crop_mode, interpolation).
        exif: turn images upright by their EXIF orientation.
        augment: geometry of training images: ``crop`` pads by an eighth and crops at a drawn place, ``crop_flip``
            mirrors half of them as well, ``resized_crop_flip`` resizes a drawn window (Szegedy et al. 2015).
        scale, ratio: area share and aspect of that window.
        auto_augment: timm's configuration string of RandAugment, AutoAugment or AugMix.
        erasing, erasing_mode: probability and fill (timm's const, rand, pixel) of random erasing (Zhong et al. 2017).
        schedule: (first epoch, side) pairs, ascending: progressive resizing of training images.
        padding: pixels that ``crop`` and ``crop_flip`` pad by; None: an eighth of the side.
    """

    size: int
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

    def size_at(self, augment_key: AugmentKey | None) -> int:
        """Side of the square images: of the epoch in training, ``size`` otherwise."""
        begun = [size for epoch, size in self.schedule if augment_key is not None and epoch <= augment_key[1]]
        return begun[-1] if begun else self.size


class ImageBackend(Protocol):
    """A backend: pixels of one split by sample id, in any order asked for.

    Attributes:
        name: for messages.
        allowed: the values of ``data.augment`` that it can do.
        policies: whether it can do ``data.auto_augment``.
        skips: whether it may leave out images that cannot be read (``data.on_error: skip``).
    """

    name: str
    allowed: tuple[str, ...]
    policies: bool
    skips: bool

    def pixels(
        self, dealt: Sequence[np.ndarray], transform: TransformConfig, augment: AugmentKey | None, size: int
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """One item for each list of ids, in its order.

        Args:
            dealt: the sample ids of each batch.
            augment: (seed, epoch) for training images; None for the evaluation look.
            size: side of the square images.

        Yields:
            (the ids delivered, pixels (n, C, size, size) on [0, 255], uint8 or float, on the CPU or on the device).
            What is delivered for an id depends on nothing but the id, ``transform``, ``augment`` and ``size``. Closing
            the iterator early frees its workers and threads.
        """
        ...

    def close(self) -> None:
        """Let go of workers and threads that wait for the next epoch."""
        ...

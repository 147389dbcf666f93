"""What every backend delivers, and what images look like to the network."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

Augment = Literal["none", "crop", "crop_flip", "resized_crop_flip"]
Moment = tuple[int, int]  # (seed, epoch) of training images: with the sample id it decides every random number


@dataclass(frozen=True)
class Look:
    """What images look like to the network.

    Attributes:
        size: side of the square input when scoring and evaluating.
        mean, std: per channel, on [0, 1].
        crop: share of the resized image that the centre crop keeps (timm's crop_pct; image files).
        interpolation: of resizing.
        augment: what training images go through.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0
    interpolation: str = "bilinear"
    augment: Augment = "none"


class Supplier(Protocol):
    """A backend: pixels of one split by sample id, in any order asked for.

    Attributes:
        allowed: the values of ``data.augment`` that it can do.
        skipped: sample id -> why it was left out (``data.on_error: skip``), of this rank so far.
    """

    allowed: tuple[str, ...]
    skipped: dict[int, str]

    def pixels(
        self, dealt: Sequence[np.ndarray], look: Look, augment: Moment | None, size: int
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """One item for each list of ids, in its order.

        Args:
            dealt: the sample ids of each batch.
            augment: (seed, epoch) for training images; None for the evaluation look.
            size: side of the square images.

        Yields:
            (the ids delivered, pixels (n, C, size, size) on [0, 255], uint8 or float, on the CPU or on the device).
            What is delivered for an id depends on nothing but the id, ``look``, ``augment`` and ``size``. Closing the
            iterator early frees its workers and threads.
        """
        ...

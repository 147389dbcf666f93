"""Pixels that are read once and held in memory, for images that many networks see."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from dist_prune.data.transform_config import AugmentKey, ImageBackend, Size, TransformConfig


class HeldPixels:
    """An image backend that keeps the pixels of each list of ids (uint8 where the backend gives uint8) on the CPU.

    Args:
        backend: reads the pixels the first time.
    """

    skips = False  # what could not be read is not asked for again

    def __init__(self, backend: ImageBackend):
        self.backend = backend
        self.name, self.allowed, self.policies = backend.name, backend.allowed, backend.policies
        self._held: dict[bytes, tuple[np.ndarray, Tensor]] = {}

    def pixels(
        self, id_lists: Sequence[np.ndarray], transform: TransformConfig, augment: AugmentKey | None, size: Size
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Load pixels by sample id; see ``ImageBackend.pixels``. Augmented images are not held."""
        if augment is not None:
            yield from self.backend.pixels(id_lists, transform, augment, size)
            return
        missing = [ids for ids in id_lists if ids.tobytes() not in self._held]
        read = self.backend.pixels(missing, transform, augment, size) if missing else iter(())
        for ids in id_lists:
            key = ids.tobytes()
            if key not in self._held:
                delivered, pixels = next(read)
                self._held[key] = delivered, pixels.cpu()
            yield self._held[key]

    def close(self) -> None:
        """End the reader's workers; the pixels stay."""
        self.backend.close()

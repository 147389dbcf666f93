"""What sources of the same form share: images whose files are decoded when they are loaded, and images in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dist_prune.data.class_order import renumbered_identity


class DecodedImages:
    """Base of sources whose images are files of any size, decoded to RGB when they are loaded.

    Attributes:
        digest: of everything that decides pixels and labels in text order. The images are not read for it.
        numbering: digest of the class order if it is not text order (see ``class_order.renumber``), else empty.
    """

    digest: str
    numbering: str
    in_chans = 3
    fixed_size = None
    images = None
    backends = ("torch",)

    @property
    def identity(self) -> str:
        """Digest of the stored images' names or sizes, labels and class order. The images are not read."""
        return renumbered_identity(self.digest, self.numbering)


class ImagesInMemory:
    """Base of sources whose pixels are in memory.

    Attributes:
        images: (n, H, W, C) uint8.
    """

    images: np.ndarray
    backends, note = ("memory", "torch"), ""

    @property
    def in_chans(self) -> int:
        """Channels C of an image."""
        return self.images.shape[3]

    @property
    def fixed_size(self) -> tuple[int, int]:
        """(height, width) of all images."""
        return self.images.shape[1:3]

    def location(self, sample: int) -> str:
        """Where a sample is stored, for messages."""
        return "in memory"

    def fetch(self, sample: int) -> np.ndarray:
        """Pixels (H, W, C) uint8 of a sample."""
        return self.images[sample]


@dataclass(frozen=True)
class StoredFiles:
    """The files in which a split is stored.

    Attributes:
        paths: of the files, by position.
        names: relative paths of their copies, by position.
        sizes: (files,) int64 bytes.
        key: digest of what tells these files from others: their places, sizes and times.
    """

    paths: Sequence[Path]
    names: Sequence[str]
    sizes: np.ndarray
    key: str


@runtime_checkable
class Copied(Protocol):
    """A source whose files can be read from copies in another folder (see staging.py)."""

    def stored_files(self) -> StoredFiles:
        """The files that its images are read from.

        Raises:
            PruneError: a file is gone.
        """
        ...

    def read_from(self, folder: Path) -> Any:
        """The same source, which reads the copies in ``folder``; its locations and its identity are the same."""
        ...

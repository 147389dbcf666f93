"""The interface of a data set: labels, and each image by its sample id. A new data form implements this alone.

Two members tell the three kinds of data sets apart:

=====================  ==========  ==============  ========================================================
kind                   ``images``  ``fixed_size``  to the network
=====================  ==========  ==============  ========================================================
arrays in memory       (n,H,W,C)   (H, W)          whole, resized as tensors
arrays read one by one None        (H, W)          the same, read in the loader's workers
image files            None        None            decoded to RGB, resized and cropped by timm's transforms
=====================  ==========  ==============  ========================================================

The rest of the package asks these members and never tests the class. A new form (tar shards, parquet) is
one file with a class and a function ``SplitSpec -> RandomAccessSource``, a line in ``datasets.OPENERS``, and its name
in ``config.data.SOURCES``. A torch ``Dataset`` needs none of this: ``data.source`` names it (map_dataset.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dist_prune.errors import PruneError

Say = Callable[[str], None]
Root = str | tuple[str, ...] | None  # a recipe's data.root
StoredImage = Path | bytes | np.ndarray  # an image file, the bytes of one, or its pixels
PICKLES = (".pkl", ".pickle")
PICKLE_TEXT = (
    "is a pickle, which runs code when it is read, so it is never read here. Convert it to an .npz file where it is "
    "trusted: docs/data.md#pickled-caches has the lines"
)


# What a source gives for each image -> the words for it.
TARGETS = {
    "classes": "one class for each image",
    "masks": "a mask for each image (data.source=maskfolder)",
    "boxes": "boxes for each image (data.source=boxfolder or coco)",
    "labels": "0 or 1 of every class for each image (data.source=npz_labels)",
    "values": "numbers for each image (data.source=npz_values)",
    "nothing": "images alone",
}


class ImageSource(Protocol):
    """One split of a data set, read by one of the backends. Sample ids are 0 to n - 1."""

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64 class numbers."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their numbers."""
        ...

    @property
    def in_chans(self) -> int:
        """Channels of an image. Without a ``fixed_size`` it is 3: such images are decoded to RGB."""
        ...

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """(height, width) that all images share: they are used whole. None: sizes differ, and images are cropped."""
        ...

    @property
    def images(self) -> np.ndarray | None:
        """(n, H, W, C) uint8 if all pixels are in memory, else None."""
        ...

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that can read it: ``memory``, ``torch`` or ``ffcv``; ``auto`` takes the first."""
        ...

    @property
    def identity(self) -> str:
        """Hex digest of everything that decides pixels and labels; stages run again if it changes."""
        ...

    def location(self, sample: int) -> str:
        """Where a sample is stored, for messages and the report: a file, or an archive and the name in it."""
        ...


def target_kind(source: object) -> str:
    """What a source gives for each image, a key of ``TARGETS``.

    A source of other targets than classes says so by its attribute ``target_kind``.
    """
    return getattr(source, "target_kind", "classes")


@runtime_checkable
class RandomAccessSource(ImageSource, Protocol):
    """A split whose images are read one by one in Python, in any order.

    Loader workers and encoding processes get copies of it. It must be picklable, and it opens files in ``fetch``.
    """

    @property
    def note(self) -> str:
        """Where the list of samples came from, for the log; may be empty."""
        ...

    def fetch(self, sample: int) -> StoredImage:
        """One image as it is stored.

        Args:
            sample: sample id.

        Returns:
            With a ``fixed_size``: (H, W, C) uint8 pixels. Without: a path or the bytes of an image file, which
            ``file_backend.read_image`` decodes, or (height, width, 3) uint8 pixels.

        Raises:
            ValueError, OSError: the sample cannot be read. ``data.on_error`` decides what follows.
        """
        ...


def fetch_pixels(source: RandomAccessSource, sample: int) -> np.ndarray:
    """One image of a source with a ``fixed_size``.

    Args:
        source: the opened split.
        sample: sample id.

    Returns:
        (H, W, C) uint8.

    Raises:
        ValueError: the sample has another shape or dtype.
        OSError: ``fetch`` cannot read it.
    """
    pixels, shape = source.fetch(sample), (*(source.fixed_size or ()), source.in_chans)
    if not isinstance(pixels, np.ndarray) or pixels.shape != shape or pixels.dtype != np.uint8:
        form = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"it is {form}, not uint8 {shape}")
    return pixels


@dataclass(frozen=True)
class SplitSpec:
    """The split that a recipe asks for.

    Attributes:
        source: the recipe's ``data.source``.
        root: its ``data.root``: a file or a folder; for shards also a pattern, or a tuple of these.
        split: sub-folder name of an image folder.
        train: whether it is the training split.
        say: takes a line for the user before something that takes long.
        layout: the recipe's ``data.layout``: the order of the axes of an .npz file's images.
        kwargs: the recipe's ``data.kwargs``, for a Dataset's class or function.
        image_size: the recipe's ``data.image_size``, without which images of a Dataset have to have one size.
        other_split: ``split`` of the other one of the two splits.
    """

    source: str
    root: Root
    split: str
    train: bool
    say: Say = lambda text: None
    layout: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    image_size: int | tuple[int, int] | None = None
    other_split: str = ""

    def path(self, expected: str) -> Path:
        """``root`` as a path that exists.

        Args:
            expected: the form of the data, for the message.

        Raises:
            PruneError: the recipe names no root, or there is nothing.
        """
        if self.root is None:
            raise PruneError(f"data.root: {self.source!r} needs the place of its files; write data.root=PATH")
        if not isinstance(self.root, str):
            raise PruneError(f"data.root: {self.source!r} takes one path, not a list")
        path = Path(self.root).expanduser()
        if not path.exists():
            raise PruneError(f"data.root: there is no {path}. {expected}")
        if path.suffix.lower() in PICKLES:
            raise PruneError(f"data.root: {path} {PICKLE_TEXT}")
        return path

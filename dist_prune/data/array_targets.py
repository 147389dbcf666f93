"""Arrays whose targets are no class numbers: ``npz_labels`` (0 or 1 of every class) and ``npz_values`` (numbers)."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dist_prune.data import array_files
from dist_prune.data.source_forms import ImagesInMemory
from dist_prune.errors import PruneError

EXPECTED_FORM = {
    "labels": "npz_labels: one .npz file with x_train, y_train, x_test, y_test (images n,H,W,C or n,H,W uint8; y is "
    "(n, classes), 1 where an image has the class, else 0).",
    "values": "npz_values: one .npz file with x_train, y_train, x_test, y_test (images n,H,W,C or n,H,W uint8; y is "
    "(n,) or (n, outputs), finite numbers).",
}


@dataclass(frozen=True)
class TargetArraySource(ImagesInMemory):
    """Images in memory with a row of targets each.

    Attributes:
        images: (n, H, W, C) uint8.
        targets: (n, outputs): int64 of 0 and 1, or float32 values.
        target_kind: ``labels`` or ``values``.
    """

    images: np.ndarray
    targets: np.ndarray
    target_kind: str

    @property
    def labels(self) -> np.ndarray:
        """(n,) zeros: an image has no class of its own, so calibration images are drawn uniformly."""
        return np.zeros(len(self.images), dtype=np.int64)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the outputs: 0, 1, ..."""
        return tuple(map(str, range(self.targets.shape[1])))

    @property
    def identity(self) -> str:
        """sha256 of pixels and targets."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        whole = hashlib.sha256(np.ascontiguousarray(self.images).data)
        whole.update(np.ascontiguousarray(self.targets).tobytes())
        return whole.hexdigest()


def read(path: Path, train: bool, layout: str | None, kind: str) -> TargetArraySource:
    """Read one split of an .npz file whose targets are no class numbers.

    Args:
        path: the file.
        train: whether to read the training split.
        layout: axes of the images, see ``array_files.read_npz``.
        kind: ``labels`` or ``values``.

    Raises:
        PruneError: the file is damaged, an array is missing, or images or targets have a wrong form.
    """
    split = "train" if train else "test"
    images, both, counts = array_files.read_arrays(path, split, layout)
    targets = {name: _checked(array, name, path, counts[name], kind) for name, array in both.items()}
    widths = {name: array.shape[1] for name, array in targets.items()}
    if len(set(widths.values())) > 1:
        raise PruneError(f"data.root: {path}: y_train and y_test have other numbers of outputs ({widths})")
    return TargetArraySource(images, targets[f"y_{split}"], kind)


def _checked(array: np.ndarray, name: str, path: Path, count: int, kind: str) -> np.ndarray:
    prefix = f"data.root: {name} of {path}"
    if kind == "values" and array.ndim == 1:
        array = array[:, None]
    if array.dtype.kind not in "iubf" or array.ndim != 2 or len(array) != count or not array.shape[1]:
        raise PruneError(f"{prefix} is {array.dtype} {array.shape} for {count} images. {EXPECTED_FORM[kind]}")
    if kind == "values":
        if not np.isfinite(array).all():
            raise PruneError(f"{prefix} has values that are not finite. {EXPECTED_FORM[kind]}")
        return array.astype(np.float32)
    others = np.unique(array[(array != 0) & (array != 1)])
    if others.size:
        hint = " Class numbers are data.source=npz." if array.shape[1] == 1 else ""
        raise PruneError(f"{prefix} has the value {others[0]}, which is neither 0 nor 1. {EXPECTED_FORM[kind]}{hint}")
    return array.astype(np.int64)

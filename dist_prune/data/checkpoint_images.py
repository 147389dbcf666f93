"""Augmented images that the interpretable-pruning authors keep in a checkpoint: ``data.source: checkpoint``.

The file holds those of the last epoch of training: ``last_epoch_imgs`` (n, C, H, W) with ``last_epoch_labels`` (n,), or
lists of batches, ``last_train_aug_data`` with ``last_train_aug_label``. They are the training images, as they are:
scored without another augmentation. Its ``test_dataset`` is an object of their program and is not read; an .npz file
has the evaluation images.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_prune.data import array_files
from dist_prune.distributed import torch_files
from dist_prune.errors import PruneError

EXPECTED_FORM = (
    "checkpoint: a file of torch with last_epoch_imgs and last_epoch_labels (or last_train_aug_data and "
    "last_train_aug_label)"
)
ENTRIES = (("last_epoch_imgs", "last_epoch_labels"), ("last_train_aug_data", "last_train_aug_label"))
EXACT = 0.02  # largest distance of a pixel from a whole number, of 255


def read_augmented(
    path: Path, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Read the augmented images of a checkpoint as the pixels that they were made of.

    Args:
        path: the checkpoint; nothing in it is run.
        mean: of each channel, with which the program normalised them; None if it did not.
        std: likewise.

    Returns:
        Images (n, H, W, C) uint8 and labels (n,) int64. Normalised again with ``mean`` and ``std`` they are the file's.

    Raises:
        PruneError: there are no such images, or they are no pixels with this mean and deviation.
    """
    body = torch_files.read(path, key="data.root")
    names = next((pair for pair in ENTRIES if isinstance(body, Mapping) and set(pair) <= body.keys()), None)
    if names is None:
        raise PruneError(f"data.root: {path} holds no augmented images. {EXPECTED_FORM}")
    images, labels = (_join(body[name], f"{path}: {name}") for name in names)
    if images.ndim != 4 or not images.is_floating_point() or labels.shape != images.shape[:1]:
        raise PruneError(
            f"data.root: {path}: images are {tuple(images.shape)} {images.dtype} and labels {tuple(labels.shape)}; "
            "expected are floats (n, C, H, W) and one label each"
        )
    channels = images.shape[1]
    scale, offset = (
        torch.tensor(values or [default] * channels, dtype=torch.float64).view(1, -1, 1, 1)
        for values, default in ((std, 1.0), (mean, 0.0))
    )
    if scale.shape[1] != channels or offset.shape[1] != channels:
        raise PruneError(f"data.mean, data.std: {path} has images of {channels} channel(s)")
    pixels = (images.double() * scale + offset) * 255
    whole = pixels.round()
    if not bool(((pixels - whole).abs() <= EXACT).all()) or float(whole.min()) < 0 or float(whole.max()) > 255:
        raise PruneError(
            f"data.mean, data.std: with {list(mean or [0.0])} and {list(std or [1.0])} the images of {path} are no "
            "pixels of 0 to 255; give the mean and deviation with which its program normalised them"
        )
    return whole.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy(), labels.long().numpy()


def read_split(path: Path, train: bool, split: str, keys: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, int]:
    """Read one split: the augmented images, or the evaluation images of the .npz file that ``split`` names.

    Args:
        path: the checkpoint.
        train: whether to read the augmented images.
        split: the recipe's ``data.eval_split``.
        keys: ``mean`` and ``std`` of the recipe's ``data`` section.

    Returns:
        Images (n, H, W, C) uint8, labels (n,) int64, and the number of classes.

    Raises:
        PruneError: as ``read_augmented`` and ``array_files.read_npz``, or ``split`` is no such file.
    """
    file = Path(split).expanduser()
    if file.suffix != ".npz" or not file.is_file():
        raise PruneError(
            f"data.eval_split: {split!r} is no .npz file. The checkpoint's own test images are an object of its "
            "program, which is not read: name a file with x_train, y_train, x_test, y_test (the test images are taken)"
        )
    images, labels, classes = array_files.read_npz(file, False, None)
    if train:
        images, labels = read_augmented(path, keys.get("mean"), keys.get("std"))
    return images, labels, classes


def _join(value: Any, where: str) -> Tensor:
    parts = value if isinstance(value, list | tuple) else [value]
    try:
        return torch.cat([torch.as_tensor(part) for part in parts])
    except (TypeError, ValueError, RuntimeError) as error:
        raise PruneError(f"data.root: {where} is no tensor and no list of batches: {error}") from error

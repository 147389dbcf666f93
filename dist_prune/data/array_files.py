"""Images and labels in an .npz file, checked before they are used."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from dist_prune.errors import PruneError

EXPECTED_FORM = "npz: one file with x_train, y_train, x_test, y_test (images n,H,W,C or n,H,W uint8)."
CHANNEL_COUNTS = (1, 2, 3, 4)  # of images as people save them
MAX_CLASSES = 1 << 16  # more classes are accepted only if their numbers are dense
MAX_NUMBERS_PER_LABEL = 10  # up to the highest class number, for each number that occurs


def read_npz(path: Path, train: bool, layout: str | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Read one split of an .npz file.

    Args:
        path: the file, with ``x_train``, ``y_train``, ``x_test`` and ``y_test``. It is never unpickled.
        train: whether to read the training split.
        layout: axes of the images: ``nhwc`` or ``nchw``. None reads (n, H, W, C) or (n, H, W), and refuses images that
            look like (n, C, H, W).

    Returns:
        Images (n, H, W, C) uint8, labels (n,) int64, and the number of classes in both splits.

    Raises:
        PruneError: the file is damaged, an array is missing, or images or labels have a wrong form.
    """
    split = "train" if train else "test"
    images, labels, counts = read_arrays(path, split, layout)
    all_labels = {name: _to_class_numbers(array, name, path, counts[name]) for name, array in labels.items()}
    return images, all_labels[f"y_{split}"], _count_classes(all_labels, path)


def read_arrays(path: Path, split: str, layout: str | None) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, int]]:
    """Read the images of one split, and the targets of both as they are.

    Args:
        path: the file. It is never unpickled.
        split: ``train`` or ``test``.
        layout: see ``read_npz``.

    Returns:
        Images (n, H, W, C) uint8; ``y_train`` and ``y_test``; and the number of images that belong to each of them.

    Raises:
        PruneError: the file is damaged, an array is missing, or images have a wrong form.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays[f"x_{split}"]
            labels = {name: _load_labels(arrays, path, name) for name in ("y_train", "y_test")}
            shapes = {name: _read_shape(arrays, name) for name in ("x_train", "x_test")}
    except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, PruneError):
            raise
        raise PruneError(f"data.root: {path} cannot be read: {error}. {EXPECTED_FORM}") from error
    if shapes["x_train"][1:] != shapes["x_test"][1:]:
        raise PruneError(
            f"data.root: {path}: training images are {shapes['x_train'][1:]}, test images {shapes['x_test'][1:]}; "
            "both need the same sides and channels"
        )
    counts = {name: shapes[f"x_{name[2:]}"][0] for name in labels}
    return _to_nhwc(images, f"x_{split}", path, layout), labels, counts


def _load_labels(arrays: np.lib.npyio.NpzFile, path: Path, name: str) -> np.ndarray:
    try:
        return arrays[name]
    except ValueError as error:
        if "pickle" not in str(error).lower():
            raise
        raise PruneError(
            f"data.root: the labels {name} of {path} are Python objects, which only unpickling could read; save them "
            "as whole numbers from 0 on: np.unique(labels, return_inverse=True)[1]"
        ) from error


def _read_shape(arrays: np.lib.npyio.NpzFile, name: str) -> tuple[int, ...]:
    """Shape of an array, read from its header alone."""
    if name not in arrays.files:
        raise KeyError(f"{name} is not in it")
    assert arrays.zip is not None  # it is open
    with arrays.zip.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return reader(file)[0]


def _to_nhwc(images: np.ndarray, name: str, path: Path, layout: str | None) -> np.ndarray:
    """Images as (n, H, W, C) uint8; raises a PruneError if they are none."""
    images = images[..., None] if images.ndim == 3 and layout != "nchw" else images
    images = images[:, None] if images.ndim == 3 else images
    if images.ndim != 4 or images.dtype != np.uint8:
        hint = ""
        if images.dtype.kind == "f" and images.size and 0 <= float(images.flat[0]) <= 1:
            hint = " To turn values from 0 to 1 into bytes: (255 * x).round().astype('uint8')."
        raise PruneError(f"data.root: {name} of {path} is {images.dtype} {images.shape}. {EXPECTED_FORM}{hint}")
    if layout == "nchw":
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    if layout is None and channels_first(images.shape):
        n, c, h, w = images.shape
        raise PruneError(
            f"data.root: {name} of {path} is {images.shape}, which looks like {n} images (channels, height, width) of "
            f"{c} x {h} x {w}; expected are (height, width, channels). Write data.layout=nchw to read it so (or save "
            f"{name}.transpose(0, 2, 3, 1)), data.layout=nhwc if it is meant as {c} x {h} pixels of {w} channels"
        )
    return images


def channels_first(shape: tuple[int, ...]) -> bool:
    """Tell whether a batch looks like (n, C, H, W).

    Args:
        shape: (n, a, b, c) of the batch.

    Returns:
        True if a is a number of channels (1 to 4) and c is not, or if b and c are equal and larger than a.
    """
    _, first, second, last = shape
    return (
        first < last and first != second and last not in CHANNEL_COUNTS and (first in CHANNEL_COUNTS or second == last)
    )


def check_sides(height: int, width: int, image_size: int | tuple[int, int] | None) -> None:
    """Refuse arrays that are not square if the recipe names no side to resize them to.

    Args:
        height: of the images in pixels.
        width: of the images in pixels.
        image_size: the recipe's ``data.image_size``.

    Raises:
        PruneError: height and width differ and ``image_size`` is None.
    """
    if height != width and image_size is None:
        raise PruneError(
            f"data.image_size: the arrays are {height} high and {width} wide, and most networks are given squares. "
            f"data.image_size={max(height, width)} squeezes them to that side, data.image_size=[{height},{width}] "
            "leaves them as they are; or pad them in the file"
        )


def _to_class_numbers(labels: np.ndarray, name: str, path: Path, image_count: int) -> np.ndarray:
    """Labels as (n,) int64; raises a PruneError that names the array if they are not class numbers."""
    prefix = f"data.root: the labels {name} of {path}"
    renumber = f"Number the classes from 0: np.unique({name}, return_inverse=True)[1]"
    if labels.dtype.kind not in "iubf":
        raise PruneError(f"{prefix} are text or other objects ({labels.dtype}), not class numbers. {renumber}")
    if labels.ndim == 2 and labels.shape[1] > 1 and len(labels) == image_count:
        raise PruneError(
            f"{prefix} are {labels.shape}, a row of {labels.shape[1]} values for each image, which looks like one-hot "
            f"labels: save {name}.argmax(1)"
        )
    if labels.size != image_count or labels.shape != (image_count, *[1] * (labels.ndim - 1)):
        raise PruneError(
            f"{prefix} are {labels.shape}, and there are {image_count} images: one label for each is needed"
        )
    labels = labels.reshape(-1)
    if labels.dtype.kind == "f" and not bool((np.isfinite(labels) & (labels == np.round(labels))).all()):
        fraction = next(value for value in labels.tolist() if not float(value).is_integer())
        raise PruneError(
            f"{prefix} are no whole numbers (the first is {fraction}): they are not class numbers. {renumber}"
        )
    if labels.size:
        lowest, highest = labels.min(), labels.max()
        if labels.dtype.kind == "u" and highest == np.iinfo(labels.dtype).max and highest - 1 not in labels:
            raise PruneError(
                f"{prefix} have the value {highest}, the largest of {labels.dtype}: a -1 that wrapped around? Classes "
                "are numbered from 0. Leave out images without a label; if the number is meant, save labels as int64"
            )
        if lowest < 0:
            raise PruneError(f"{prefix} go down to {lowest}: classes are numbered from 0. {renumber}")
        if highest >= 2**62:
            raise PruneError(f"{prefix} go up to {highest}: no class number. {renumber}")
    return labels.astype(np.int64)


def _count_classes(all_labels: dict[str, np.ndarray], path: Path) -> int:
    """Number of classes in both splits; raises a PruneError if the highest number is absurd."""
    highest = {name: int(labels.max()) if labels.size else -1 for name, labels in all_labels.items()}
    name = max(highest, key=highest.__getitem__)
    count = highest[name] + 1
    occurring = len(np.union1d(*all_labels.values()))
    if count > MAX_CLASSES and count > MAX_NUMBERS_PER_LABEL * occurring:
        raise PruneError(
            f"data.root: the labels {name} of {path} go up to {highest[name]:,}, and only {occurring} numbers occur: a "
            f"head of {count:,} classes is not what is meant. Number the classes from 0: "
            f"np.unique({name}, return_inverse=True)[1]"
        )
    return count

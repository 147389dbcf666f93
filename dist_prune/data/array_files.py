"""Arrays in an .npz file: images and labels, looked at before they are believed."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from dist_prune.errors import PruneError

FORM = "npz: one file with x_train, y_train, x_test, y_test (images n,H,W,C or n,H,W uint8)."
COLOURS = (1, 2, 3, 4)
MOST = 1 << 16  # classes; more of them only where labels are not far apart
SPREAD = 10  # numbers per label that occurs


def read(path: Path, train: bool, layout: str | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Images (n, H, W, C) uint8, labels (n,) int64, and the number of classes, of one split.

    Args:
        layout: ``nhwc`` or ``nchw`` where the recipe says it; None refuses images that look like (n, C, H, W).

    Raises:
        PruneError: a damaged file, missing arrays, images or labels that are none.
    """
    part = "train" if train else "test"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays[f"x_{part}"]
            labels = {name: _array(arrays, path, name) for name in ("y_train", "y_test")}
            shapes = {name: _shape(arrays, name) for name in ("x_train", "x_test")}
    except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, PruneError):
            raise
        raise PruneError(f"data.root: {path} cannot be read: {error}. {FORM}") from error
    whole = {name: _labels(found, name, path, shapes[f"x_{name[2:]}"][0]) for name, found in labels.items()}
    classes = _classes(whole, path)
    if shapes["x_train"][1:] != shapes["x_test"][1:]:
        raise PruneError(
            f"data.root: {path}: training images are {shapes['x_train'][1:]}, test images {shapes['x_test'][1:]}; "
            "both need the same sides and channels"
        )
    return _images(images, f"x_{part}", path, layout), whole[f"y_{part}"], classes


def _array(arrays: np.lib.npyio.NpzFile, path: Path, name: str) -> np.ndarray:
    try:
        return arrays[name]
    except ValueError as error:
        if "pickle" not in str(error).lower():
            raise
        raise PruneError(
            f"data.root: the labels {name} of {path} are Python objects, which only unpickling could read; save them "
            "as whole numbers from 0 on: np.unique(labels, return_inverse=True)[1]"
        ) from error


def _shape(arrays: np.lib.npyio.NpzFile, name: str) -> tuple[int, ...]:
    """Of an array, from its header alone."""
    if name not in arrays.files:
        raise KeyError(f"{name} is not in it")
    assert arrays.zip is not None  # it is open
    with arrays.zip.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return reader(file)[0]


def _images(images: np.ndarray, name: str, path: Path, layout: str | None) -> np.ndarray:
    """(n, H, W, C) uint8."""
    images = images[..., None] if images.ndim == 3 and layout != "nchw" else images
    images = images[:, None] if images.ndim == 3 else images
    if images.ndim != 4 or images.dtype != np.uint8:
        hint = ""
        if images.dtype.kind == "f" and images.size and 0 <= float(images.flat[0]) <= 1:
            hint = " Of values from 0 to 1 make bytes: (255 * x).round().astype('uint8')."
        raise PruneError(f"data.root: {name} of {path} is {images.dtype} {images.shape}. {FORM}{hint}")
    if layout == "nchw":
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    if layout is None and channels_first(images.shape):
        n, c, h, w = images.shape
        raise PruneError(
            f"data.root: {name} of {path} is {images.shape}, which looks like {n} images (channels, height, width) of "
            f"{c} x {h} x {w}; expected are (height, width, channels). Write data.layout=nchw to read it so (or save "
            f"{name}.transpose(0, 2, 3, 1)), data.layout=nhwc where it is meant as {c} x {h} pixels of {w} channels"
        )
    return images


def channels_first(shape: tuple[int, ...]) -> bool:
    """Whether a batch's shape looks like (n, C, H, W): few channels in front, or the two equal sides behind."""
    _, first, second, last = shape
    return first < last and first != second and last not in COLOURS and (first in COLOURS or second == last)


def check_sides(height: int, width: int, image_size: int | None) -> None:
    """PruneError where arrays are not square and the recipe does not say to which side they are squeezed."""
    if height != width and image_size is None:
        raise PruneError(
            f"data.image_size: the arrays are {height} high and {width} wide, and networks are given squares. "
            f"data.image_size={max(height, width)} squeezes them to that side; or pad them in the file"
        )


def _labels(labels: np.ndarray, name: str, path: Path, images: int) -> np.ndarray:
    """(n,) int64; PruneError blames the labels where they are no class numbers."""
    where = f"data.root: the labels {name} of {path}"
    renumber = f"Number the classes from 0: np.unique({name}, return_inverse=True)[1]"
    if labels.dtype.kind not in "iubf":
        raise PruneError(f"{where} are text or other objects ({labels.dtype}), not class numbers. {renumber}")
    if labels.ndim == 2 and labels.shape[1] > 1 and len(labels) == images:
        raise PruneError(
            f"{where} are {labels.shape}, a row of {labels.shape[1]} values for each image, which looks like one-hot "
            f"labels: save {name}.argmax(1)"
        )
    if labels.size != images or labels.shape != (images, *[1] * (labels.ndim - 1)):
        raise PruneError(f"{where} are {labels.shape}, and there are {images} images: one label for each is needed")
    labels = labels.reshape(-1)
    if labels.dtype.kind == "f" and not bool((np.isfinite(labels) & (labels == np.round(labels))).all()):
        odd = next(value for value in labels.tolist() if not float(value).is_integer())
        raise PruneError(f"{where} are no whole numbers (the first is {odd}): they are not class numbers. {renumber}")
    if labels.size:
        low, high = labels.min(), labels.max()
        if labels.dtype.kind == "u" and high == np.iinfo(labels.dtype).max and high - 1 not in labels:
            raise PruneError(
                f"{where} have the value {high}, the largest of {labels.dtype}: a -1 that wrapped around? Classes are "
                "numbered from 0. Leave out what has no label; where the number is meant, save labels as int64"
            )
        if low < 0:
            raise PruneError(f"{where} go down to {low}: classes are numbered from 0. {renumber}")
        if high >= 2**62:
            raise PruneError(f"{where} go up to {high}: no class number. {renumber}")
    return labels.astype(np.int64)


def _classes(whole: dict[str, np.ndarray], path: Path) -> int:
    """How many classes the labels of both splits mean; PruneError where a number is absurd."""
    high = {name: int(labels.max()) if labels.size else -1 for name, labels in whole.items()}
    name = max(high, key=high.__getitem__)
    count = high[name] + 1
    occurring = len(np.union1d(*whole.values()))
    if count > MOST and count > SPREAD * occurring:
        raise PruneError(
            f"data.root: the labels {name} of {path} go up to {high[name]:,}, and only {occurring} numbers occur: a "
            f"head of {count:,} classes is not what is meant. Number the classes from 0: "
            f"np.unique({name}, return_inverse=True)[1]"
        )
    return count

"""Data sets behind one interface: uint8 images by sample id, labels, class names."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dist_prune.data import array_files, folder_layout, folder_scan
from dist_prune.data.class_order import identity
from dist_prune.data.folder_index import Names, index_of
from dist_prune.data.random_access import ImageSource, RandomAccessSource, Say, SplitSpec
from dist_prune.errors import PruneError

# source -> classes, channels, side, for sets that are what they are wherever they lie
KNOWN = {
    "digits": (10, 1, 8),
    "cifar10": (10, 3, 32),
    "cifar100": (100, 3, 32),
    "mnist": (10, 1, 28),
    "fashion_mnist": (10, 1, 28),
}


@dataclass(frozen=True)
class ArraySource:
    """Images in memory, (n, H, W, C) uint8."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    backends, note = ("memory", "torch"), ""

    @property
    def in_chans(self) -> int:
        return self.images.shape[3]

    @property
    def fixed_size(self) -> tuple[int, int]:
        return self.images.shape[1:3]

    @property
    def identity(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        pixels = hashlib.sha256(np.ascontiguousarray(self.images).data).hexdigest()
        return hashlib.sha256(pixels.encode() + self.labels.tobytes()).hexdigest()

    def location(self, sample: int) -> str:
        return "in memory"

    def fetch(self, sample: int) -> np.ndarray:
        return self.images[sample]


class Paths:
    """The files of an index, below its folder."""

    def __init__(self, root: Path, names: Names):
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> Path:
        return self.root / self.names[place]


@dataclass(frozen=True)
class FolderSource:
    """Image files, one folder a class; decoded to RGB when they are needed.

    Attributes:
        digest: of names, sizes, labels and classes in text order.
        note: where the list of files came from, and what was left out.
        numbering: of classes in another order than text (numbering.py), a digest of it.
    """

    paths: Paths
    labels: np.ndarray
    classes: tuple[str, ...]
    digest: str
    note: str = ""
    numbering: str = ""
    in_chans, fixed_size, images, backends = 3, None, None, ("torch",)

    @property
    def identity(self) -> str:
        return identity(self.digest, self.numbering)

    def location(self, sample: int) -> str:
        return str(self.paths[sample])

    def fetch(self, sample: int) -> Path:
        return self.paths[sample]


def open_source(
    source: str, root: str | None, split: str, train: bool, say: Say = lambda text: None, layout: str | None = None
) -> RandomAccessSource:
    """Open the training or the evaluation split of a data set by its entry in ``OPENERS``.

    Args:
        source, root, split, train, say, layout: see ``SplitSpec``.

    Raises:
        PruneError: missing or malformed data, with what was expected where.
    """
    return OPENERS[source](SplitSpec(source, root, split, train, say, layout))


def select_classes(source: ImageSource, classes: Sequence[int] | None) -> Any:
    """The images of some classes, renumbered in their order; PruneError for image files and unknown classes."""
    if classes is None:
        return source
    if source.images is None:
        raise PruneError("data.classes is for arrays in memory; of image files, name a folder with fewer class folders")
    if len(set(classes)) != len(classes) or any(c >= len(source.classes) for c in classes):
        raise PruneError(f"data.classes: {list(classes)} are not different numbers below {len(source.classes)}")
    keep = np.isin(source.labels, classes)
    number = np.zeros(len(source.classes), dtype=np.int64)
    number[list(classes)] = np.arange(len(classes))
    return ArraySource(source.images[keep], number[source.labels[keep]], tuple(source.classes[c] for c in classes))


def check(source: ImageSource, what: str) -> None:
    """PruneError where labels and classes contradict one another."""
    if len(source.labels) == 0:
        raise PruneError(f"{what}: there are no images")
    if len(source.classes) == 1:
        raise PruneError(f"{what}: all of them are of one class, {source.classes[0]!r}: there is nothing to learn")
    low, high = int(source.labels.min()), int(source.labels.max())
    if low < 0 or high >= len(source.classes):
        raise PruneError(f"{what}: labels run from {low} to {high}, but there are {len(source.classes)} classes")


def check_figures(mean: Sequence[float] | None, std: Sequence[float] | None, in_chans: int) -> None:
    """PruneError where a recipe's normalisation has another number of channels than the images."""
    for key, given in (("mean", mean), ("std", std)):
        if given is not None and len(given) != in_chans:
            raise PruneError(f"data.{key}: {len(given)} values for images of {in_chans} channel(s)")


def same_classes(train: ImageSource, test: ImageSource) -> None:
    """PruneError where the two splits do not have the same classes: labels would mean different things."""
    _alike(train.classes, test.classes)


def _alike(train: Sequence[str], test: Sequence[str]) -> None:
    if tuple(train) != tuple(test):
        missing, extra = sorted(set(train) - set(test))[:4], sorted(set(test) - set(train))[:4]
        raise PruneError(
            f"the evaluation images have {len(test)} classes, the training images {len(train)}; "
            f"missing in evaluation: {missing}, only there: {extra}. Both need the same class folders."
        )


def class_folders(root: str | None, train_split: str, eval_split: str) -> tuple[tuple[str, ...], str]:
    """Class folders of an image folder in text order, without a look at every file; and what was left out, in words.

    None where the training split is not here.

    Raises:
        PruneError: what a run refuses of the folders that are here: none, a single one, one without images, other ones
            for evaluation.
    """
    place, out, left = Path(root or "").expanduser(), {}, Counter[str]()
    for split, key in ((train_split, "data.train_split"), (eval_split, "data.eval_split")):
        if not root or not (place / split).is_dir():
            continue
        found, beside = folder_scan.class_folders(place / split)
        if not found:
            raise PruneError(folder_scan.no_classes(place / split))
        folder_layout.check(place, split, key, found)
        bare = [name for name in found if not folder_scan.holds_image(place / split / name)]
        if bare:
            raise PruneError(folder_scan.check_not_empty(place / split, bare, {}))
        out[key], left = tuple(found), left + beside
    if len(out) == 2:
        _alike(*out.values())
    return out.get("data.train_split", ()), folder_scan.left_out_text(left)


def npz_shape(root: str | None, layout: str | None, image_size: int | None) -> tuple[int, int, int] | None:
    """(classes, channels, side) of an .npz data set; None where it is not there. PruneError as a run has it."""
    if not root or not Path(root).expanduser().is_file():
        return None
    source = _npz(SplitSpec("npz", root, "", False, layout=layout))
    check(source, "the evaluation images of npz")
    array_files.check_sides(*source.fixed_size, image_size)
    return len(source.classes), source.in_chans, source.fixed_size[0]


def _expected(source: str) -> str:
    return {
        "npz": array_files.FORM,
        "imagefolder": "imagefolder: ROOT/train/<class>/<image> and ROOT/val/<class>/<image> "
        "(data.train_split and data.eval_split name other sub-folders).",
    }.get(source, f"{source}: the folder that torchvision's data set of this name reads (it is not downloaded).")


def _digits(spec: SplitSpec) -> ArraySource:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found: Any = load_digits()
    pixels = (found["images"] * (255 / 16)).round().astype(np.uint8)[..., None]
    labels = found["target"].astype(np.int64)
    here, there = train_test_split(np.arange(len(labels)), test_size=450, random_state=0, stratify=labels)
    ids = np.sort(here if spec.train else there)
    return ArraySource(pixels[ids], labels[ids], tuple(str(n) for n in range(10)))


def _npz(spec: SplitSpec) -> ArraySource:
    images, labels, classes = array_files.read(spec.path(_expected("npz")), spec.train, spec.layout)
    return ArraySource(images, labels, tuple(map(str, range(classes))))


def _torchvision(spec: SplitSpec) -> ArraySource:
    from torchvision import datasets

    kinds = {
        "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100,
        "mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST,
    }  # fmt: skip
    path = spec.path(_expected(spec.source))
    try:
        found = kinds[spec.source](str(path), train=spec.train, download=False)
    except (RuntimeError, OSError) as error:
        raise PruneError(f"data.root: no {spec.source} below {path} ({error}). {_expected(spec.source)}") from error
    images = np.asarray(found.data, dtype=np.uint8)
    images = images[..., None] if images.ndim == 3 else images
    return ArraySource(images, np.asarray(found.targets, dtype=np.int64), tuple(map(str, found.classes)))


def _folder(spec: SplitSpec) -> FolderSource:
    root, key = spec.path(_expected("imagefolder")), "data.train_split" if spec.train else "data.eval_split"
    path = root / spec.split
    if not path.is_dir():
        raise folder_layout.missing_split(root, spec.split, key, _expected("imagefolder"))
    folder_layout.check(root, spec.split, key, folder_scan.class_folders(path)[0])
    found, note = index_of(path, spec.say)
    return FolderSource(Paths(path, found.names), found.labels, found.classes, found.digest, note)


OPENERS: dict[str, Callable[[SplitSpec], RandomAccessSource]] = {
    "digits": _digits, "npz": _npz, "imagefolder": _folder,
    "cifar10": _torchvision, "cifar100": _torchvision, "mnist": _torchvision, "fashion_mnist": _torchvision,
}  # fmt: skip

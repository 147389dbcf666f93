"""Data sets with one interface: uint8 images by sample id, labels, class names."""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from dist_prune.config.data import Data
from dist_prune.data import (
    array_files,
    array_targets,
    box_layouts,
    checkpoint_images,
    folder_layout,
    folder_scan,
    mask_folder,
    plain_folder,
)
from dist_prune.data.digits import read_digits
from dist_prune.data.folder_index import Names, load_or_scan
from dist_prune.data.listed_layouts import find_listing
from dist_prune.data.map_dataset import open_dataset
from dist_prune.data.parquet_files import open_parquet
from dist_prune.data.random_access import ImageSource, RandomAccessSource, Root, Say, SplitSpec, target_kind
from dist_prune.data.source_forms import DecodedImages, ImagesInMemory, StoredFiles
from dist_prune.data.split_checks import check_labels, check_same_classes, check_same_form, check_same_names
from dist_prune.data.tar_shards import open_tar
from dist_prune.data.transform_config import Size
from dist_prune.errors import PruneError

# source -> (classes, channels, side in pixels), for data sets of which every copy is the same
KNOWN = {
    "digits": (10, 1, 8),
    "cifar10": (10, 3, 32),
    "cifar100": (100, 3, 32),
    "mnist": (10, 1, 28),
    "fashion_mnist": (10, 1, 28),
    "svhn": (10, 3, 32),
}


@dataclass(frozen=True)
class ArraySource(ImagesInMemory):
    """Images in memory.

    Attributes:
        images: (n, H, W, C) uint8.
        labels: (n,) int64 class numbers.
        classes: class names in the order of their numbers.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    @property
    def identity(self) -> str:
        """sha256 of pixels and labels."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        pixels = hashlib.sha256(np.ascontiguousarray(self.images).data).hexdigest()
        return hashlib.sha256(pixels.encode() + self.labels.tobytes()).hexdigest()


class Paths(Sequence[Path]):
    """Paths of the image files of an index, in the order of the sample ids."""

    def __init__(self, root: Path, names: Names):
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path:  # type: ignore[override] # no slices
        return self.root / self.names[index]


@dataclass(frozen=True)
class FolderSource(DecodedImages):
    """Image files, one folder a class; decoded to RGB when they are loaded.

    Attributes:
        paths: the files, by sample id.
        labels: (n,) int64 class numbers.
        classes: class names in the order of their numbers.
        digest: of names, sizes, labels and classes in text order.
        note: where the list of files came from, and which files were left out.
        numbering: see ``DecodedImages``.
        sizes: (n,) int64 bytes of the files; None: not known.
        copies: folder with copies of the files that are read instead of them; None: none.
    """

    paths: Paths
    labels: np.ndarray
    classes: tuple[str, ...]
    digest: str
    note: str = ""
    numbering: str = ""
    sizes: np.ndarray | None = None
    copies: Path | None = None

    def location(self, sample: int) -> str:
        """Path of the sample's file, for messages."""
        return str(self.paths[sample])

    def fetch(self, sample: int) -> Path:
        """Path of the sample's file, or of its copy."""
        return self.paths[sample] if self.copies is None else self.copies / self.paths.names[sample]

    def stored_files(self) -> StoredFiles:
        """The image files."""
        assert self.sizes is not None  # of a folder without an index
        place = os.fsencode(self.paths.root.resolve()) + self.digest.encode()
        return StoredFiles(self.paths, self.paths.names, self.sizes, hashlib.sha256(place).hexdigest())

    def read_from(self, folder: Path) -> "FolderSource":
        """The same images, read from copies of the files in ``folder``."""
        return replace(self, copies=folder)


@dataclass(frozen=True)
class DatasetKeys:
    """The recipe's keys for a Dataset beside those of every data source.

    Attributes:
        kwargs: ``data.kwargs``; for a checkpoint's images ``mean`` and ``std`` of the section.
        image_size: ``data.image_size``.
        splits: ``data.train_split`` and ``data.eval_split``.
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    image_size: Size | None = None
    splits: tuple[str, str] | None = None

    @classmethod
    def of(cls, data: Data) -> "DatasetKeys":
        """Those of a recipe's ``data`` section."""
        kwargs = {"mean": data.mean, "std": data.std} if data.source == "checkpoint" else data.kwargs
        return cls(kwargs, data.image_size, (data.train_split, data.eval_split))


def open_source(
    source: str,
    root: Root,
    split: str,
    train: bool,
    say: Say = lambda text: None,
    layout: str | None = None,
    dataset: DatasetKeys | None = None,
) -> RandomAccessSource:
    """Open the training or the evaluation split of a data set by its entry in ``OPENERS``, or of a Dataset.

    Args:
        source: the recipe's ``data.source``: a key of ``OPENERS``, or a Dataset (see map_dataset.py). The latter runs
            the code that it names, which a recipe may do and a bundle may not.
        root: the recipe's ``data.root``: a file or a folder; for shards also a pattern, or a tuple of these.
        split: sub-folder name of an image folder.
        train: whether to open the training split.
        say: takes a line for the user before something that takes long.
        layout: the recipe's ``data.layout`` of an .npz file.
        dataset: the recipe's keys for a Dataset.

    Raises:
        PruneError: missing or malformed data, with the expected form and place.
    """
    keys = dataset or DatasetKeys()
    other = keys.splits[train] if keys.splits else ""
    spec = SplitSpec(source, root, split, train, say, layout, other_split=other)
    if source == "checkpoint":
        eval_split = keys.splits[1] if keys.splits else split
        return _open_checkpoint(replace(spec, kwargs=keys.kwargs, split=eval_split))
    if source in OPENERS:
        with readable(root):
            return OPENERS[source](spec)
    return open_dataset(replace(spec, kwargs=keys.kwargs, image_size=keys.image_size))


@contextlib.contextmanager
def readable(root: Root) -> Iterator[None]:
    """Turn the errors of the file system into a PruneError that names the file.

    Args:
        root: the recipe's ``data.root``.
    """
    try:
        yield
    except OSError as error:
        place, reason = error.filename or root, error.strerror or error
        raise PruneError(f"data.root: {place} cannot be read: {reason}") from error


def select_classes(source: ImageSource, classes: Sequence[int] | None) -> Any:
    """Keep the images of some classes.

    Args:
        source: the opened split.
        classes: numbers of the classes to keep, which become 0, 1, ... in this order; None keeps all.

    Raises:
        PruneError: ``source`` has no pixels in memory, or a class is unknown or named twice.
    """
    if classes is None:
        return source
    if target_kind(source) != "classes":
        raise PruneError("data.classes chooses images by their one class; these have none: leave the key out")
    if source.images is None:
        raise PruneError(
            "data.classes is for arrays in memory; for image files, name a folder with fewer class folders"
        )
    if len(set(classes)) != len(classes) or any(c >= len(source.classes) for c in classes):
        raise PruneError(f"data.classes: {list(classes)} are not different numbers below {len(source.classes)}")
    keep = np.isin(source.labels, classes)
    number = np.zeros(len(source.classes), dtype=np.int64)
    number[list(classes)] = np.arange(len(classes))
    return ArraySource(source.images[keep], number[source.labels[keep]], tuple(source.classes[c] for c in classes))


def class_folders(root: str | None, train_split: str, eval_split: str) -> tuple[tuple[str, ...], str]:
    """List the class folders of both splits of an image folder without a scan of all files.

    Args:
        root: the recipe's ``data.root``.
        train_split: sub-folder of the training images.
        eval_split: sub-folder of the evaluation images.

    Returns:
        The training classes in text order (empty if there is no such folder), and a text about files left out.

    Raises:
        PruneError: a folder that exists would be refused by a run: it has no classes, a single class, a class without
            images, or the two splits have different classes.
    """
    with readable(root):
        return _class_folders(Path(root).expanduser() if root else None, train_split, eval_split)


def _class_folders(folder: Path | None, train_split: str, eval_split: str) -> tuple[tuple[str, ...], str]:
    classes = {}
    left_out = Counter[str]()
    for split, key in ((train_split, "data.train_split"), (eval_split, "data.eval_split")):
        listing = find_listing(folder, split, key == "data.train_split") if folder else None
        if listing is not None:
            classes[key] = listing.classes
            continue
        if folder is None or not (folder / split).is_dir():
            continue
        names, others = folder_scan.class_folders(folder / split)
        if not names:
            raise PruneError(folder_scan.no_classes_message(folder / split))
        folder_layout.check_class_count(folder, split, key, names)
        empty = [name for name in names if not folder_scan.contains_image(folder / split / name)]
        if empty:
            raise PruneError(folder_scan.empty_classes_message(folder / split, empty, {}))
        classes[key], left_out = tuple(names), left_out + others
    if len(classes) == 2:
        check_same_names(*classes.values())
    return classes.get("data.train_split", ()), folder_scan.left_out_text(left_out)


def npz_shape(
    root: str | None, layout: str | None, image_size: Size | None, kind: str = "npz"
) -> tuple[int, int, int] | None:
    """Read classes, channels and side of an .npz data set.

    Args:
        root: the recipe's ``data.root``.
        layout: the recipe's ``data.layout``.
        image_size: the recipe's ``data.image_size``.
        kind: the recipe's ``data.source``: ``npz``, ``npz_labels`` or ``npz_values``.

    Returns:
        (classes, channels, side in pixels), or None if there is no such file.

    Raises:
        PruneError: a run would refuse the file.
    """
    if not root or not Path(root).expanduser().is_file():
        return None
    source = cast(Any, OPENERS[kind](SplitSpec(kind, root, "", False, layout=layout)))
    check_labels(source, "the evaluation images of npz")
    height, width = source.fixed_size
    array_files.check_sides(height, width, image_size)
    return len(source.classes), source.in_chans, height


def dataset_shape(data: Data) -> tuple[int, int, int | None]:
    """Open both splits of a Dataset, as a run would.

    Args:
        data: the recipe's ``data`` section.

    Returns:
        (classes, channels, side in pixels, or None if sizes differ).

    Raises:
        PruneError: a run would refuse it.
    """
    train, test = (
        open_source(data.source, data.root, split, is_train, dataset=DatasetKeys.of(data))
        for split, is_train in ((data.train_split, True), (data.eval_split, False))
    )
    for source, name in ((train, "training"), (test, "evaluation")):
        check_labels(source, f"the {name} images of {data.source}")
    check_same_classes(train, test)
    check_same_form(train, test, data.image_size)
    if train.fixed_size is not None:
        array_files.check_sides(*train.fixed_size, data.image_size)
    return len(data.classes or train.classes), train.in_chans, train.fixed_size[0] if train.fixed_size else None


def _expected_form(source: str) -> str:
    return {
        "npz": array_files.EXPECTED_FORM,
        "maskfolder": mask_folder.EXPECTED_FORM,
        **box_layouts.EXPECTED_FORM,
        "imagefolder": "imagefolder: ROOT/train/<class>/<image> and ROOT/val/<class>/<image> "
        "(data.train_split and data.eval_split name other sub-folders).",
    }.get(source, f"{source}: the folder that torchvision's data set of this name reads (it is not downloaded).")


def _open_digits(spec: SplitSpec) -> ArraySource:
    return ArraySource(*read_digits(spec.train), tuple(str(n) for n in range(10)))


def _open_npz(spec: SplitSpec) -> ArraySource:
    images, labels, classes = array_files.read_npz(spec.path(_expected_form("npz")), spec.train, spec.layout)
    return ArraySource(images, labels, tuple(map(str, range(classes))))


def _open_checkpoint(spec: SplitSpec) -> ArraySource:
    path = spec.path(checkpoint_images.EXPECTED_FORM)
    images, labels, classes = checkpoint_images.read_split(path, spec.train, spec.split, spec.kwargs)
    return ArraySource(images, labels, tuple(map(str, range(classes))))


def _open_targets(spec: SplitSpec, kind: str) -> array_targets.TargetArraySource:
    return array_targets.read(spec.path(array_targets.EXPECTED_FORM[kind]), spec.train, spec.layout, kind)


def _open_torchvision(spec: SplitSpec) -> ArraySource:
    from torchvision import datasets

    datasets_by_name = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "mnist": datasets.MNIST,
        "fashion_mnist": datasets.FashionMNIST,
    }
    path = spec.path(_expected_form(spec.source))
    try:
        dataset = datasets_by_name[spec.source](str(path), train=spec.train, download=False)
    except (RuntimeError, OSError) as error:
        raise PruneError(
            f"data.root: no {spec.source} below {path} ({error}). {_expected_form(spec.source)}"
        ) from error
    images = np.asarray(dataset.data, dtype=np.uint8)
    images = images[..., None] if images.ndim == 3 else images
    return ArraySource(images, np.asarray(dataset.targets, dtype=np.int64), tuple(map(str, dataset.classes)))


def _open_svhn(spec: SplitSpec) -> ArraySource:
    from torchvision.datasets import SVHN

    path = spec.path(_expected_form("svhn"))
    try:
        dataset = SVHN(str(path), split="train" if spec.train else "test", download=False)
    except (RuntimeError, OSError, ValueError) as error:
        raise PruneError(f"data.root: no svhn in {path} ({error}). {_expected_form('svhn')}") from error
    images = np.ascontiguousarray(dataset.data.transpose(0, 2, 3, 1))
    return ArraySource(images, dataset.labels.astype(np.int64), tuple(map(str, range(10))))


def _open_folder(spec: SplitSpec) -> FolderSource:
    root, key = spec.path(_expected_form("imagefolder")), "data.train_split" if spec.train else "data.eval_split"
    path = root / spec.split
    if listing := find_listing(root, spec.split, spec.train):
        index = listing.index()
        note = f"{len(index.names):,} images by {listing.form}{folder_scan.left_out_text(index.left_out)}"
        files = Paths(listing.base, index.names)
        return FolderSource(files, index.labels, index.classes, index.digest, note, sizes=index.sizes)
    if not path.is_dir():
        raise folder_layout.missing_split_error(root, spec.split, key, _expected_form("imagefolder"))
    folder_layout.check_class_count(root, spec.split, key, folder_scan.class_folders(path)[0])
    index, note = load_or_scan(path, spec.say)
    files = Paths(path, index.names)
    return FolderSource(files, index.labels, index.classes, index.digest, note, sizes=index.sizes)


OPENERS: dict[str, Callable[[SplitSpec], RandomAccessSource]] = {
    "digits": _open_digits,
    "npz": _open_npz,
    "checkpoint": _open_checkpoint,
    "npz_labels": partial(_open_targets, kind="labels"),
    "npz_values": partial(_open_targets, kind="values"),
    "imagefolder": _open_folder,
    "maskfolder": mask_folder.open_masks,
    "boxfolder": box_layouts.open_boxes,
    "coco": box_layouts.open_coco,
    "images": plain_folder.open_images,
    "tar": open_tar,
    "parquet": open_parquet,
    "cifar10": _open_torchvision,
    "cifar100": _open_torchvision,
    "mnist": _open_torchvision,
    "fashion_mnist": _open_torchvision,
    "svhn": _open_svhn,
}

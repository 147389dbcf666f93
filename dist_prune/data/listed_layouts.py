"""Image data sets whose classes are not folders but listed in a file, as their publishers distribute them.

=============================  ====================================================================================
tiny-ImageNet's ``val``        ``val/images/*`` and ``val/val_annotations.txt``
ImageNet's flat ``val``        ``val/*.JPEG`` and Kaggle's ``LOC_val_solution.csv``, a list of synsets (one per line,
                               in the order of the file names), or the devkit's ground truth with its ``meta.mat``
CUB-200-2011                   ``images.txt``, ``image_class_labels.txt``, ``classes.txt``, ``train_test_split.txt``
splits as CSV (mini-ImageNet)  ``train.csv`` with ``filename,label``, and the files in ``images/``; ``classes.txt``
                               with a name a line, if a split lacks some of them
=============================  ====================================================================================
"""

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_prune.data.folder_index import FolderIndex, Names
from dist_prune.data.folder_scan import HIDDEN, IMAGE_FILES, is_folder, size_of
from dist_prune.errors import PruneError

SYNSET_LISTS = ("imagenet_2012_validation_synset_labels.txt", "synset_labels.txt", "val_synsets.txt")
GROUND_TRUTH, META, KAGGLE = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "LOC_val_solution.csv"
DEVKIT = ("", "ILSVRC2012_devkit_t12/data", "devkit/data", "data")
FILE_COLUMNS, CLASS_COLUMNS = ("filename", "file", "image", "path", "image_id"), ("label", "class", "wnid", "target")


@dataclass(frozen=True)
class Listing:
    """The images of one split, as a file lists them.

    Attributes:
        base: folder that ``names`` are relative to.
        names: file names -> class names.
        classes: all classes in text order.
        form: the layout and its files, for messages.
    """

    base: Path
    names: Mapping[str, str]
    classes: tuple[str, ...]
    form: str

    def index(self) -> FolderIndex:
        """The listed files with their sizes, ascending by class and name.

        Raises:
            PruneError: a listed file is missing.
        """
        sizes = dict(_sizes(self.base, {os.path.dirname(name) for name in self.names}))
        if missing := [name for name in self.names if name not in sizes]:
            more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
            raise PruneError(f"data.root: {self.base / missing[0]}{more} is listed by {self.form} and is not there")
        number = {name: index for index, name in enumerate(self.classes)}
        ordered = sorted(self.names, key=lambda name: (number[self.names[name]], name))
        return FolderIndex(
            Names.from_names(ordered),
            np.array([number[self.names[name]] for name in ordered], dtype=np.int64),
            np.array([sizes[name] for name in ordered], dtype=np.int64),
            self.classes,
            (),
            np.zeros(0, dtype=np.int64),
            0,
            {"not listed": len(sizes) - len(ordered)} if len(sizes) > len(ordered) else {},
        )


def find_listing(root: Path, split: str, train: bool) -> Listing | None:
    """The listing of one split of a data set; None if it has class folders, or nothing that is known.

    Args:
        root: the recipe's ``data.root``.
        split: the recipe's ``data.train_split`` or ``data.eval_split``.
        train: whether it is the training split.

    Raises:
        PruneError: the files of a known layout are there, and one of them is damaged or contradicts the images.
    """
    folder = root / split
    if (folder / "val_annotations.txt").is_file():
        return _tiny_imagenet(root, folder)
    if folder.is_dir():
        return _imagenet(root, folder) if _is_flat(folder) else None
    if all((root / name).is_file() for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")):
        return _cub(root, train)
    if (root / f"{split}.csv").is_file():
        return _from_csv(root, root / f"{split}.csv")
    return None


def _tiny_imagenet(root: Path, folder: Path) -> Listing:
    path = folder / "val_annotations.txt"
    names = _one_class_each(path, ((f"images/{row[0]}", row[1]) for row in _rows(path, 2)))
    known = root / "wnids.txt"
    classes = {row[0] for row in _rows(known, 1)} if known.is_file() else set(names.values())
    return Listing(folder, names, tuple(sorted(classes | set(names.values()))), f"{path} (tiny-ImageNet)")


def _imagenet(root: Path, folder: Path) -> Listing | None:
    files = sorted(entry.name for entry in os.scandir(folder) if _is_image(entry.name))
    above = (root, *list(root.resolve().parents)[:4])  # Kaggle's archive has ILSVRC/Data/CLS-LOC/val
    for place in above:
        if (place / KAGGLE).is_file():
            stems = {os.path.splitext(name)[0]: name for name in files}
            rows = _one_class_each(place / KAGGLE, _kaggle_rows(place / KAGGLE))
            names = {stems.get(stem, f"{stem}.JPEG"): synset for stem, synset in rows.items()}
            return _checked(folder, files, names, f"{place / KAGGLE} (ImageNet, Kaggle's list)")
    for place in (folder, root, *(root / part for part in DEVKIT[1:]), *(root.parent / part for part in DEVKIT)):
        for name in SYNSET_LISTS:
            if (place / name).is_file():
                synsets = [row[0] for row in _rows(place / name, 1)]
                return _in_order(folder, files, synsets, f"{place / name} (ImageNet, a synset a line)")
        if (place / GROUND_TRUTH).is_file():
            if not (place / META).is_file():
                raise PruneError(
                    f"data.root: {place / GROUND_TRUTH} numbers the classes as the devkit does; its {META} must lie "
                    f"beside it, or a list of synsets ({SYNSET_LISTS[0]})"
                )
            synset = _devkit_synsets(place / META)
            numbers = [int(row[0]) for row in _rows(place / GROUND_TRUTH, 1)]
            if unknown := [number for number in numbers if number not in synset]:
                raise PruneError(f"data.root: {place / GROUND_TRUTH} has class {unknown[0]}, {META} does not")
            return _in_order(folder, files, [synset[n] for n in numbers], f"{place / GROUND_TRUTH} (ImageNet, devkit)")
    return None


def _kaggle_rows(path: Path) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(_csv(path), 2):  # the first line is the header
        words = (row.get("PredictionString") or "").split()
        if not row.get("ImageId") or not words:
            raise PruneError(f"data.root: row {number} of {path} has no ImageId or no PredictionString: {row}")
        yield row["ImageId"], words[0]


def _one_class_each(path: Path, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """File -> class of the pairs in ``path``; PruneError if a file is listed with two classes."""
    names: dict[str, str] = {}
    for file, name in pairs:
        if names.setdefault(file, name) != name:
            raise PruneError(f"data.root: {path} lists {file} twice, as {names[file]!r} and as {name!r}")
    return names


def _devkit_synsets(path: Path) -> dict[int, str]:
    """The devkit's number of each class that has no classes below it -> its synset."""
    from scipy.io import loadmat

    try:
        table = loadmat(path, squeeze_me=True, struct_as_record=True)["synsets"]
        leaves = table[table["num_children"] == 0]
        return {int(number): str(name) for number, name in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)}
    except Exception as error:  # a damaged file makes scipy raise many types
        raise PruneError(f"data.root: {path} cannot be read: {error}") from error


def _in_order(folder: Path, files: Sequence[str], synsets: Sequence[str], form: str) -> Listing:
    if len(files) != len(synsets):
        raise PruneError(
            f"data.root: {form} lists {len(synsets):,} images, and {folder} holds {len(files):,}: lines belong to "
            "files in the order of their names, so the numbers must agree"
        )
    return _checked(folder, files, dict(zip(files, synsets, strict=True)), form)


def _checked(folder: Path, files: Sequence[str], names: Mapping[str, str], form: str) -> Listing:
    if unlisted := [name for name in files if name not in names]:
        more = f" (and {len(unlisted) - 1:,} more)" if len(unlisted) > 1 else ""
        raise PruneError(f"data.root: {folder / unlisted[0]}{more} is not listed by {form}")
    return Listing(folder, names, tuple(sorted(set(names.values()))), form)


def _cub(root: Path, train: bool) -> Listing:
    files, number, class_of, part = (
        _one_class_each(root / name, _pairs(root / name))
        for name in ("images.txt", "image_class_labels.txt", "classes.txt", "train_test_split.txt")
    )
    wanted = {key for key, flag in part.items() if (flag == "1") == train}
    try:
        names = {files[key]: class_of[number[key]] for key in files if key in wanted}
    except KeyError as error:
        raise PruneError(f"data.root: {root}: number {error} is in one of the lists and not in another") from error
    return Listing(root / "images", names, tuple(sorted(class_of.values())), f"{root / 'images.txt'} (CUB-200)")


def _from_csv(root: Path, path: Path) -> Listing:
    rows = list(_csv(path))
    header = list(rows[0]) if rows else []
    file = next((name for name in FILE_COLUMNS if name in header), None)
    label = next((name for name in CLASS_COLUMNS if name in header), None)
    if file is None or label is None:
        raise PruneError(f"data.root: {path} has the columns {', '.join(header) or 'none'}; it needs filename,label")
    base = root / "images" if (root / "images").is_dir() else root
    names: dict[str, str] = {}
    for number, row in enumerate(rows, 2):  # the first line is the header
        if not row[file] or not row[label]:
            raise PruneError(f"data.root: row {number} of {path} has no {label if row[file] else file}: {row}")
        if names.setdefault(row[file], row[label]) != row[label]:
            raise PruneError(
                f"data.root: {path} lists {row[file]} twice, as {names[row[file]]!r} and, in row {number}, as "
                f"{row[label]!r}"
            )
    listed = root / "classes.txt"
    classes = set(_text(listed).splitlines()) - {""} if listed.is_file() else set(names.values())
    return Listing(base, names, tuple(sorted(classes | set(names.values()))), f"{path} (a CSV split)")


def _rows(path: Path, columns: int) -> Iterator[list[str]]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            row = line.split()
            if len(row) < columns:
                raise PruneError(f"data.root: line {number} of {path} has {len(row)} columns, not {columns}")
            yield row


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    return ((row[0], row[1]) for row in _rows(path, 2))


def _csv(path: Path) -> Iterator[dict[str, str]]:
    return csv.DictReader(_text(path).splitlines())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a mark of their own before the text
    except (OSError, ValueError) as error:
        raise PruneError(f"data.root: {path} cannot be read: {error}") from error


def _sizes(base: Path, folders: set[str]) -> Iterator[tuple[str, int]]:
    """(name relative to ``base``, bytes) of the image files in some folders."""
    for folder in sorted(folders):
        if (base / folder).is_dir():
            with os.scandir(base / folder) as entries:
                for entry in entries:
                    size = size_of(entry) if _is_image(entry.name) else None
                    if size is not None:
                        yield f"{folder}/{entry.name}" if folder else entry.name, size


def _is_flat(folder: Path) -> bool:
    """Whether image files lie directly in a folder, and no folder does."""
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(HIDDEN)]
    return not any(is_folder(entry) for entry in shown) and any(_is_image(entry.name) for entry in shown)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_FILES) and not name.startswith(HIDDEN)

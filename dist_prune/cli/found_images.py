"""What lies in a folder of images: the splits, their classes, counts and sizes, as recipe keys and figures."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_prune.config.data import SHARDS
from dist_prune.data.datasets import DatasetKeys, open_source
from dist_prune.data.decoders import read_image
from dist_prune.data.folder_layout import has_class_folders
from dist_prune.data.folder_scan import class_folders, find_images
from dist_prune.data.listed_layouts import find_listing
from dist_prune.data.mask_folder import MASK_FOLDERS
from dist_prune.data.random_access import RandomAccessSource
from dist_prune.data.shard_names import COMPRESSED
from dist_prune.data.split_checks import check_labels, check_same_classes
from dist_prune.errors import PruneError, abbreviate

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("val", "valid", "validation", "test", "testing", "eval")
READ = 500  # images of a split whose sizes are read, evenly spread over it


@dataclass(frozen=True)
class FoundImages:
    """Images that a recipe can name.

    Attributes:
        data: keys of the recipe's ``data`` section.
        one_split: whether the same images train and evaluate, because there is no other split.
        classes: class names in text order.
        counts: split -> number of images.
        smallest: smallest number of training images of a class.
        sides: (smallest, median, largest) shorter side in pixels of the images that were read.
        read: number of images that were opened for their size.
        unreadable: those that could not be read.
    """

    data: dict[str, Any]
    one_split: bool
    classes: tuple[str, ...]
    counts: dict[str, int]
    smallest: int
    sides: tuple[int, int, int]
    read: int
    unreadable: list[str] = field(default_factory=list)


def find_layout(folder: Path) -> tuple[dict[str, Any], bool]:
    """Find how a folder, or an .npz file, holds labelled images.

    Returns:
        Keys of a recipe's ``data`` section, and whether the same images serve as both splits.

    Raises:
        PruneError: there is no such folder, or it holds no labelled images; says what it holds.
    """
    if folder.suffix == ".npz" and folder.is_file():
        return {"source": "npz", "root": str(folder)}, False
    if not folder.is_dir():
        pattern = any(mark in str(folder) for mark in "{*?[")
        more = ". It takes no pattern: name the folder, or write a recipe with data.source and data.root"
        raise PruneError(f"--data: there is no folder {folder}{more if pattern else ''}")
    _refuse_other_tasks(folder)
    unpacked = [folder, *(folder / name for name in (*TRAIN_NAMES, *EVAL_NAMES) if (folder / name).is_dir())]
    if not any(map(has_class_folders, unpacked)) and (shards := _find_shards(folder)):  # else they are the download
        return shards
    for evaluation in EVAL_NAMES:
        if find_listing(folder, "train", True) and find_listing(folder, evaluation, False):
            splits = {"train_split": "train", "eval_split": evaluation}
            return {"source": "imagefolder", "root": str(folder), **splits}, False
    names, _ = class_folders(folder)
    by_name = {name.lower(): name for name in names}
    train = next((by_name[name] for name in TRAIN_NAMES if name in by_name), "")
    evaluation = next((by_name[name] for name in EVAL_NAMES if name in by_name), "")
    if train or evaluation:
        splits = {"train_split": train or evaluation, "eval_split": evaluation or train}
        return {"source": "imagefolder", "root": str(folder), **splits}, not (train and evaluation)
    if has_class_folders(folder):
        splits = {"train_split": folder.name, "eval_split": folder.name}
        return {"source": "imagefolder", "root": str(folder.resolve().parent), **splits}, True
    raise PruneError(_nothing_found(folder, names))


def _find_shards(folder: Path) -> tuple[dict[str, Any], bool] | None:
    """Tar or parquet files in a folder, in its ``data`` (as Hugging Face lays them out) or in a folder per split."""
    for source, place in ((source, place) for source in SHARDS for place in (folder, folder / "data")):
        found = [path for form in ("[!.]*", "*/[!.]*") for path in place.glob(form)]
        packed = sorted(path.name for path in found if f".{source}." in path.name and path.suffix.lower() in COMPRESSED)
        if packed:
            raise PruneError(
                f"--data: {place} holds compressed shards ({abbreviate(packed, 3)}), in which no image can be read "
                f"without all before it: unpack them (gunzip {packed[0]})"
            )
        found = [path for path in found if path.suffix.lower() == f".{source}"]
        files = [path.name if path.parent == place else path.parent.name for path in found]
        train = next((name for name in TRAIN_NAMES if any(name in file for file in files)), "")
        evaluation = next((name for name in EVAL_NAMES if any(name in file for file in files)), "")
        if train or evaluation:
            splits = {"train_split": train or evaluation, "eval_split": evaluation or train}
            return {"source": source, "root": str(place), **splits}, not (train and evaluation)
        if files:
            raise PruneError(
                f"--data: {place} holds {len(files)} {source} files ({abbreviate(sorted(files), 3)}), and no name says "
                f"which split they are of: {', '.join(TRAIN_NAMES)} and {', '.join(EVAL_NAMES)} are known. Write a "
                f"recipe with data.source={source} and data.root={place}/NAME-{{split}}-*.{source}"
            )
    return None


def _refuse_other_tasks(folder: Path) -> None:
    """Raise a ``PruneError`` for images with masks or boxes, whose folders are no classes."""
    for split in (folder, *(folder / name for name in (*TRAIN_NAMES, *EVAL_NAMES))):
        if (split / "images").is_dir() and any((split / name).is_dir() for name in MASK_FOLDERS):
            raise PruneError(
                f"--data: {split} holds images with a mask each, so images and masks are no classes. 'new' writes "
                "recipes for classification; for segmentation take one with task: segmentation (dist-prune list "
                f"recipes) and write data.source=maskfolder data.root={split if split == folder else folder}"
            )
    if (folder / "boxes.json").is_file() or list(folder.glob("annotations/instances_*.json")):
        raise PruneError(
            f"--data: {folder} holds images with boxes. 'new' writes recipes for classification; for detection take "
            f"one with task: detection (dist-prune list recipes) and write data.root={folder}"
        )


def unlabelled(folder: Path) -> list[Path] | None:
    """The images of a folder that has no classes, neither as folders nor in a list; None if it has some, or no image.

    Raises:
        PruneError: there is no such folder.
    """
    if folder.is_file():
        return None
    if not folder.is_dir():
        raise PruneError(f"--data: there is no folder {folder}")
    names, _ = class_folders(folder)
    split = {*TRAIN_NAMES, *EVAL_NAMES} & {name.lower() for name in names}
    if split or has_class_folders(folder):
        return None
    return find_images(folder)[0] or None


def _nothing_found(folder: Path, names: list[str]) -> str:
    form = f"It needs {folder}/<class>/<image>, or {folder}/train/<class>/<image> and {folder}/val/<class>/<image>"
    images = find_images(folder)[0]
    if not images:
        return f"--data: {folder} holds no image. {form}"
    if len(names) == 1:
        return f"--data: {folder} has one class folder, {names[0]!r}: with one class there is nothing to learn. {form}"
    if not names:
        return f"--data: {folder} has {len(images)} images and no class folders, so their classes are unknown. {form}"
    return f"--data: {folder} has the folders {abbreviate(names, 4)}, and not two with images in them. {form}"


def look(folder: Path) -> FoundImages:
    """Open the splits, count their classes, and read the sizes of up to 500 images of each.

    Raises:
        PruneError: see ``find_layout``; or a run would refuse the images, or none can be read.
    """
    data, one_split = find_layout(folder)
    names = (data.get("train_split", ""), data.get("eval_split", ""))
    sources = {
        split: open_source(
            data["source"], data["root"], names[split == "eval"], split == "train", dataset=DatasetKeys(splits=names)
        )
        for split in (("train",) if one_split else ("train", "eval"))
    }
    if not one_split:
        check_same_classes(sources["train"], sources["eval"])
    sides, unreadable, read = [], [], 0
    for split, source in sources.items():
        check_labels(source, f"--data: the {split} images of {folder}")
        step = max(1, len(source.labels) // READ)
        for sample in range(0, len(source.labels), step):
            read += 1
            try:
                sides.append(_side(source, sample))
            except (ValueError, OSError) as error:
                unreadable.append(f"{source.location(sample)}: {error}")
    if not sides:
        raise PruneError(f"--data: none of the images of {folder} can be read ({unreadable[0]})")
    labels = sources["train"].labels.tolist()
    classes = sources["train"].classes
    return FoundImages(
        data,
        one_split,
        classes,
        {split: len(source.labels) for split, source in sources.items()},
        min(labels.count(number) for number in range(len(classes))),
        (min(sides), int(statistics.median(sides)), max(sides)),
        read,
        unreadable,
    )


def _side(source: RandomAccessSource, sample: int) -> int:
    if source.fixed_size is not None:
        return min(source.fixed_size)
    stored: Any = source.fetch(sample)
    return min(read_image(stored).size)

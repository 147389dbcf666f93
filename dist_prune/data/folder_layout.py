"""A folder that is not what a recipe takes it for: which one near it would work."""

import os
from collections.abc import Sequence
from pathlib import Path

from dist_prune.data.folder_scan import HIDDEN, IMAGE_FILES, class_folders, is_folder
from dist_prune.errors import PruneError, abbreviate, nearest

LOOKED_AT = 64  # folders, of those in which something is looked for


def missing_split(root: Path, split: str, key: str, form: str) -> PruneError:
    """There is no folder of that split.

    Args:
        root, split: the recipe's ``data.root`` and the name of its sub-folder.
        key: the recipe's key of that name.
        form: what is expected where.
    """
    inner, _ = class_folders(root)
    said = f"data.root: there is no folder {root / split}. {form}"
    above = [name for name in inner[:LOOKED_AT] if (root / name / split).is_dir()]
    if above:
        return PruneError(f"{said} There is one in {root / above[0]}: write data.root={root / above[0]}")
    if holds_classes(root):
        return PruneError(
            f"{said} {root} holds class folders itself ({abbreviate(inner, 4)}): "
            f"write data.root={root.parent} {key}={root.name}"
        )
    near = nearest(split, inner)
    return PruneError(said + (f" {root} has {abbreviate(inner, 4)}: {key}= names another.{near}" if inner else ""))


def check(root: Path, split: str, key: str, classes: Sequence[str]) -> None:
    """PruneError where there is a single class folder: the classes lie elsewhere, or there is nothing to tell apart.

    Args:
        root, split, key: as above.
        classes: the class folders of ``root / split``.
    """
    if len(classes) != 1:
        return
    place = root / split / classes[0]
    said = f"data.root: {root / split} has a single class folder, {classes[0]!r}"
    if holds_classes(place) and not _images(place):
        inner, _ = class_folders(place)
        raise PruneError(
            f"{said}, and the images lie one level deeper, in {len(inner)} folders ({abbreviate(inner, 4)}). If those "
            f"are the classes, write {key}={split}/{classes[0]}"
        )
    raise PruneError(f"{said}: with one class there is nothing to learn. It needs {root / split}/<class>/<image>")


def holds_classes(folder: Path) -> bool:
    """Whether there are two folders or more with images right in them."""
    return sum(_images(folder / name) for name in class_folders(folder)[0][:LOOKED_AT]) >= 2


def _images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(
            entry.name.lower().endswith(IMAGE_FILES) and not entry.name.startswith(HIDDEN) and not is_folder(entry)
            for entry in entries
        )

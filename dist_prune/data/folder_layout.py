"""Errors about the layout of an image folder, with the change that would help."""

import os
from collections.abc import Sequence
from pathlib import Path

from dist_prune.data.folder_scan import HIDDEN, IMAGE_FILES, class_folders, is_folder, shards_hint
from dist_prune.data.random_access import PICKLE_TEXT, PICKLES
from dist_prune.errors import PruneError, abbreviate, nearest

MAX_FOLDERS = 64  # searched for a hint


def missing_split_error(root: Path, split: str, key: str, form: str) -> PruneError:
    """Make the error for a missing sub-folder of a split.

    Args:
        root: the recipe's ``data.root``.
        split: name of the sub-folder.
        key: the recipe's key of that name.
        form: the expected form of the data, for the message.
    """
    subfolders, _ = class_folders(root)
    message = f"data.root: there is no folder {root / split}. {form}"
    candidates = [name for name in subfolders[:MAX_FOLDERS] if (root / name / split).is_dir()]
    pickles = sorted(path.name for path in root.iterdir() if path.suffix.lower() in PICKLES) if root.is_dir() else []
    if pickles:
        return PruneError(f"{message} {root / pickles[0]} {PICKLE_TEXT}")
    if candidates:
        return PruneError(f"{message} There is one in {root / candidates[0]}: write data.root={root / candidates[0]}")
    if has_class_folders(root):
        return PruneError(
            f"{message} {root} holds class folders itself ({abbreviate(subfolders, 4)}): "
            f"write data.root={root.parent} {key}={root.name}"
        )
    if shards := shards_hint(root):
        return PruneError(message.removesuffix(".") + shards)
    suggestion = nearest(split, subfolders)
    return PruneError(
        message + (f" {root} has {abbreviate(subfolders, 4)}: {key}= names another.{suggestion}" if subfolders else "")
    )


def check_class_count(root: Path, split: str, key: str, classes: Sequence[str]) -> None:
    """Refuse a split with a single class folder.

    Args:
        root: the recipe's ``data.root``.
        split: name of the sub-folder.
        key: the recipe's key of that name.
        classes: the class folders of ``root / split``.

    Raises:
        PruneError: there is one class folder; the message says whether the classes are one level deeper.
    """
    if len(classes) != 1:
        return
    folder = root / split / classes[0]
    message = f"data.root: {root / split} has a single class folder, {classes[0]!r}"
    if has_class_folders(folder) and not _has_images(folder):
        subfolders, _ = class_folders(folder)
        raise PruneError(
            f"{message}, and the images lie one level deeper, in {len(subfolders)} folders "
            f"({abbreviate(subfolders, 4)}). If those are the classes, write {key}={split}/{classes[0]}"
        )
    raise PruneError(f"{message}: with one class there is nothing to learn. It needs {root / split}/<class>/<image>")


def has_class_folders(folder: Path) -> bool:
    """Whether at least two of the first ``MAX_FOLDERS`` sub-folders hold image files directly."""
    return sum(_has_images(folder / name) for name in class_folders(folder)[0][:MAX_FOLDERS]) >= 2


def _has_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(
            entry.name.lower().endswith(IMAGE_FILES) and not entry.name.startswith(HIDDEN) and not is_folder(entry)
            for entry in entries
        )

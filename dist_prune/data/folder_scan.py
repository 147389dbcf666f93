"""What lies in a folder of images: its class folders, the image files below them, and what is left out, counted."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# what Pillow decodes by itself; not formats of which it reads a header only (HDF5, MPEG) or that need programs (EPS)
IMAGE_FILES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".webp", ".avif", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga", ".pcx", ".sgi", ".ras", ".qoi", ".ico",
)  # fmt: skip
NO_FILES = "named as images that are no files (FIFO, socket, device, circular link)"
HIDDEN = "."  # names that begin with it (.ipynb_checkpoints, .DS_Store) are no images and no classes, anywhere


def class_folders(root: Path) -> tuple[list[str], Counter[str]]:
    """Names of the class folders in text order, and what lies beside them that belongs to no class."""
    classes, left = [], Counter[str]()
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith(HIDDEN):
                left["hidden"] += 1
            elif is_folder(entry):
                classes.append(entry.name)
            else:
                left[f"{_kind(entry.name)} beside the class folders"] += 1
    return sorted(classes), left


def holds_image(folder: Path) -> bool:
    """Whether there is an image file anywhere below a folder; looks no further than the first."""
    return any(
        name.lower().endswith(IMAGE_FILES) and not name.startswith(HIDDEN)
        for _, _, names in _walked(folder)
        for name in names
    )


def _walked(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    for place, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(HIDDEN)]
        yield place, inner, names


def find_images(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """The image files anywhere below a folder, as a scan finds them in a class folder, and what was left out."""
    found = scan_folder(folder, "", ())
    return [folder / name for name, _ in found.files], dict(found.left)


def left_out_text(left: Mapping[str, int]) -> str:
    """What was left out, to be put behind a sentence; empty where nothing was."""
    if not left:
        return ""
    parts = [f"{count:,} {kind}" for kind, count in sorted(left.items(), key=lambda item: (-item[1], item[0]))]
    more = f" and {len(parts) - 6} more kinds" if len(parts) > 6 else ""
    return f"; left out: {', '.join(parts[:6])}{more}"


def no_classes(root: Path) -> str:
    """What is wrong with a folder that has no folders in it."""
    loose = [entry.name for entry in os.scandir(root) if entry.name.lower().endswith(IMAGE_FILES)]
    said = f"data.root: {root} has no class folders; it needs {root}/<class>/<image>"
    return said + (f". Its {len(loose)} images lie in it directly, so nobody knows their classes" if loose else "")


def check_not_empty(root: Path, empty: list[str], left: Mapping[str, int]) -> str:
    more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
    return (
        f"data.root: the class folder {root / empty[0]}{more} holds no image ({', '.join(IMAGE_FILES)})"
        f"{left_out_text(left)}. A folder that is no class must not lie beside the class folders: move it away, or "
        "name another folder with data.train_split and data.eval_split"
    )


@dataclass
class FolderScan:
    """What lies below a folder: (name, bytes) of the images in order, (name, time of change) of folders, the rest."""

    files: list[tuple[str, int]] = field(default_factory=list)
    folders: list[tuple[str, int]] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)


def scan_folder(root: Path, folder: str, above: tuple[tuple[int, int], ...]) -> FolderScan:
    status = os.stat(root / folder)
    me, found = (status.st_dev, status.st_ino), FolderScan()
    if me in above:  # a link back up
        return found
    deeper: list[str] = []
    with os.scandir(root / folder) as entries:
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(HIDDEN):
                found.left["hidden"] += 1
            elif is_folder(entry):
                deeper.append(name)
            elif entry.name.lower().endswith(IMAGE_FILES):
                size = size_of(entry)
                if size is None:
                    found.left[NO_FILES] += 1
                else:
                    found.files.append((name, size))
            else:
                found.left[_kind(entry.name)] += 1
    found.files.sort()
    found.folders.append((folder, status.st_mtime_ns))
    for name in sorted(deeper):
        more = scan_folder(root, name, (*above, me))
        found.files += more.files
        found.folders += more.folders
        found.left += more.left
    return found


def _kind(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"


def size_of(entry: os.DirEntry[str]) -> int | None:
    """Bytes of a file, -1 for a link to nowhere, None for what is no file: FIFO, socket, device, circular link.

    Those are never opened: a reader of a FIFO waits for a writer that may never come.
    """
    try:
        status = entry.stat()
    except OSError as error:  # a link to nowhere: listed, and reported when it is read
        return None if error.errno == errno.ELOOP else -1
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder; a link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False

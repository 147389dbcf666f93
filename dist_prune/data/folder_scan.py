"""Scan of an image folder: class folders, image files below them, and counts of everything else."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# Formats that Pillow decodes by itself: not those with a header reader only (HDF5, MPEG) or that need programs (EPS).
IMAGE_FILES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".webp", ".avif", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga", ".pcx", ".sgi", ".ras", ".qoi", ".ico",
)  # fmt: skip
NOT_REGULAR = "with the name of an image that are not regular files (FIFO, socket, device, circular link)"
HIDDEN = "."  # first character of names that are never images or classes (.ipynb_checkpoints, .DS_Store)


def class_folders(root: Path) -> tuple[list[str], Counter[str]]:
    """List the class folders of a folder.

    Returns:
        Names in text order, and kind of name -> number of other entries.
    """
    classes, left_out = [], Counter[str]()
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith(HIDDEN):
                left_out["hidden"] += 1
            elif is_folder(entry):
                classes.append(entry.name)
            else:
                left_out[f"{_suffix_kind(entry.name)} beside the class folders"] += 1
    return sorted(classes), left_out


def contains_image(folder: Path) -> bool:
    """Whether there is an image file anywhere below a folder; the search ends at the first."""
    return any(
        name.lower().endswith(IMAGE_FILES) and not name.startswith(HIDDEN)
        for _, _, names in _walk_visible(folder)
        for name in names
    )


def _walk_visible(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    for path, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(HIDDEN)]
        yield path, subfolders, names


def find_images(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """Find all image files below a folder.

    Returns:
        Paths in the order of ``scan_folder``, and kind of name -> number of entries that are not images.
    """
    scan = scan_folder(folder, "", ())
    return [folder / name for name, _ in scan.files], dict(scan.left_out)


def left_out_text(left_out: Mapping[str, int]) -> str:
    """Text about entries left out, to be appended to a sentence; empty if there are none."""
    if not left_out:
        return ""
    parts = [f"{count:,} {kind}" for kind, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0]))]
    more = f" and {len(parts) - 6} more kinds" if len(parts) > 6 else ""
    return f"; left out: {', '.join(parts[:6])}{more}"


def no_classes_message(root: Path) -> str:
    """Error text for a folder without class folders."""
    loose = [entry.name for entry in os.scandir(root) if entry.name.lower().endswith(IMAGE_FILES)]
    message = f"data.root: {root} has no class folders; it needs {root}/<class>/<image>"
    message += f". Its {len(loose)} images lie in it directly, so their classes are unknown" if loose else ""
    return message + shards_hint(root)


def shards_hint(root: Path) -> str:
    """What to write for a folder that holds shards; empty if it holds none, or is none."""
    for source in ("tar", "parquet"):
        count = sum(1 for path in root.glob("*") if path.suffix.lower() == f".{source}" and path.is_file())
        if count:
            return f". It holds {count} {source} files: write data.source={source} (pack: --source {source}:{root})"
    return ""


def empty_classes_message(root: Path, empty: list[str], left_out: Mapping[str, int]) -> str:
    """Error text for class folders without images.

    Args:
        root: the folder of the class folders.
        empty: names of the class folders without images.
        left_out: kind of name -> number of entries that are not images.
    """
    more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
    return (
        f"data.root: the class folder {root / empty[0]}{more} holds no image ({', '.join(IMAGE_FILES)})"
        f"{left_out_text(left_out)}. A folder that is not a class must not lie beside the class folders: move it away, "
        "or name another folder with data.train_split and data.eval_split"
    )


@dataclass
class FolderScan:
    """Result of a scan.

    Attributes:
        files: (name, bytes) of the image files, relative to the root.
        folders: (name, modification time in nanoseconds) of the folders.
        left_out: kind of name -> number of entries that are not images.
    """

    files: list[tuple[str, int]] = field(default_factory=list)
    folders: list[tuple[str, int]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def scan_folder(root: Path, folder: str, ancestors: tuple[tuple[int, int], ...]) -> FolderScan:
    """Scan a folder and the folders below it. A link to a folder above is not followed.

    Args:
        root: names are relative to it.
        folder: the folder to scan, relative; "" is ``root``.
        ancestors: (device, inode) of the folders above.

    Returns:
        Image files ascending by name; those of a folder come before those of its sub-folders.
    """
    status = os.stat(root / folder)
    inode, scan = (status.st_dev, status.st_ino), FolderScan()
    if inode in ancestors:  # a link to a folder above
        return scan
    subfolders: list[str] = []
    with os.scandir(root / folder) as entries:
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(HIDDEN):
                scan.left_out["hidden"] += 1
            elif is_folder(entry):
                subfolders.append(name)
            elif entry.name.lower().endswith(IMAGE_FILES):
                size = size_of(entry)
                if size is None:
                    scan.left_out[NOT_REGULAR] += 1
                else:
                    scan.files.append((name, size))
            else:
                scan.left_out[_suffix_kind(entry.name)] += 1
    scan.files.sort()
    scan.folders.append((folder, status.st_mtime_ns))
    for name in sorted(subfolders):
        inner = scan_folder(root, name, (*ancestors, inode))
        scan.files += inner.files
        scan.folders += inner.folders
        scan.left_out += inner.left_out
    return scan


def _suffix_kind(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"


def size_of(entry: os.DirEntry[str]) -> int | None:
    """Size of a file in bytes, -1 for a broken link, None for a FIFO, socket, device or circular link.

    These are never opened: a reader of a FIFO waits for a writer that may never come.
    """
    try:
        status = entry.stat()
    except OSError as error:  # a broken link: listed, and reported when it is read
        return None if error.errno == errno.ELOOP else -1
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder; a link to itself is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False

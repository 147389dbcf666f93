"""Index of an image folder: names, labels and sizes of its files, scanned once and saved beside the data.

``ROOT/train.index.npz`` belongs to ROOT/train. If it cannot be written there, it is saved in the user's cache folder
($XDG_CACHE_HOME or ~/.cache, dist_prune/). It is used again while no folder has changed: names and modification times
of the folders are compared. Overwriting a file in place changes neither, so delete the index in that case.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dist_prune.data import folder_scan, index_store
from dist_prune.data.random_access import Say
from dist_prune.errors import PruneError
from dist_prune.fileio import user_cache

KIND = "folder-3"
SCANNERS = 16  # threads: on network file systems a scan mostly waits
SETTLED_S = 2.0  # a folder changed this shortly before its scan may change again within the clock's resolution


class Names(Sequence[str]):
    """Many names in two arrays; each loader worker would get a copy of a million Python strings.

    Args:
        blob: all names one after another, uint8.
        ends: (n,) int64, end of each name in ``blob``.
    """

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def from_names(cls, names: Iterable[str]) -> "Names":
        """Pack names."""
        raw = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in raw], dtype=np.int64)
        return cls(np.frombuffer(b"".join(raw), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override] # no slices
        index = range(len(self.ends))[index]
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.blob[start : int(self.ends[index])].tobytes())


@dataclass(frozen=True)
class FolderIndex:
    """Image files of a folder.

    Attributes:
        names: paths of the files relative to the folder, ascending by class, sub-folder and name.
        labels: (n,) int64 class numbers.
        sizes: (n,) int64 bytes.
        classes: names of the class folders, ascending.
        folders: all folders that were scanned, relative; "" is the root.
        mtimes_ns: modification times of ``folders`` in nanoseconds.
        scanned_ns: time of the scan in nanoseconds.
        left_out: kind of name (``.txt``, ``hidden``) -> number of entries that are not images. For messages only.
    """

    names: Names
    labels: np.ndarray
    sizes: np.ndarray
    classes: tuple[str, ...]
    folders: tuple[str, ...]
    mtimes_ns: np.ndarray
    scanned_ns: int
    left_out: dict[str, int] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """sha256 of names, sizes, labels and classes."""
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        for array in (self.names.blob, self.names.ends, self.sizes, self.labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def is_current(self, root: Path) -> bool:
        """Whether no folder below ``root`` was added, removed or changed since the scan."""
        limit = self.scanned_ns - int(SETTLED_S * 1e9)
        try:
            times = [os.stat(root / folder).st_mtime_ns for folder in self.folders]
        except OSError:
            return False
        return bool((np.array(times) == self.mtimes_ns).all()) and max(times) < limit


def load_or_scan(root: Path, say: Say = lambda text: None) -> tuple[FolderIndex, str]:
    """Load the index of an image folder, or scan the folder and save the index.

    Args:
        root: the folder of the class folders.
        say: takes a line for the user before a scan.

    Returns:
        The index, and a text about where it came from.

    Raises:
        PruneError: there are no class folders, or one has no image.
    """
    for path in index_locations(root):
        index = load(path)
        if index is not None and index.is_current(root):
            return index, f"{len(index.names):,} images by {path}{folder_scan.left_out_text(index.left_out)}"
    say(f"data: scanning {root} (once; its index is kept)")
    start = time.perf_counter()
    index = scan(root)
    seconds = time.perf_counter() - start
    summary = f"{len(index.names):,} images, scanned in {seconds:.1f} s{folder_scan.left_out_text(index.left_out)}"
    kept = index_store.save_first(index, index_locations(root), save)
    return index, f"{summary}, index kept in {kept}" if kept else f"{summary}; the index could not be saved"


def index_locations(root: Path) -> tuple[Path, Path]:
    """Paths at which the index of a folder may be saved, best first."""
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return root.with_name(f"{root.name}.index.npz"), user_cache() / f"{root.name}-{key}.index.npz"


def scan(root: Path) -> FolderIndex:
    """Scan all class folders and the folders in them. Names that begin with a dot are left out, and counted.

    Args:
        root: the folder of the class folders.

    Raises:
        PruneError: there are no class folders, or one has no image.
    """
    started_ns = time.time_ns()
    classes, left_out = folder_scan.class_folders(root)
    if not classes:
        raise PruneError(folder_scan.no_classes_message(root))
    with ThreadPoolExecutor(SCANNERS) as pool:
        scans = list(pool.map(lambda name: folder_scan.scan_folder(root, name, ()), classes))
    empty = [name for name, folder in zip(classes, scans, strict=True) if not folder.files]
    if empty:
        raise PruneError(
            folder_scan.empty_classes_message(root, empty, sum((folder.left_out for folder in scans), Counter()))
        )
    folders = [("", os.stat(root).st_mtime_ns), *(entry for folder in scans for entry in folder.folders)]
    return FolderIndex(
        Names.from_names(name for folder in scans for name, _ in folder.files),
        np.repeat(np.arange(len(classes)), [len(folder.files) for folder in scans]),
        np.array([size for folder in scans for _, size in folder.files], dtype=np.int64),
        tuple(classes),
        tuple(name for name, _ in folders),
        np.array([at for _, at in folders], dtype=np.int64),
        started_ns,
        dict(sum((folder.left_out for folder in scans), left_out)),
    )


def save(index: FolderIndex, path: Path) -> None:
    """Write an index to a file; raises a PruneError if that fails."""
    arrays = {
        "blob": index.names.blob,
        "ends": index.names.ends,
        "labels": index.labels,
        "sizes": index.sizes,
        "classes": _join_names(index.classes),
        "folders": _join_names(index.folders),
        "changed": index.mtimes_ns,
    }
    index_store.save(path, KIND, arrays, {"scanned": index.scanned_ns, "left": index.left_out}, index.digest)


def load(path: Path) -> FolderIndex | None:
    """Read the index in a file; None if there is none, or if it is damaged or of another format."""
    return index_store.load(path, KIND, _from_store)


def _from_store(arrays: Mapping[str, np.ndarray], text: dict[str, Any]) -> FolderIndex:
    return FolderIndex(
        Names(arrays["blob"], arrays["ends"]),
        arrays["labels"],
        arrays["sizes"],
        _split_names(arrays["classes"]),
        _split_names(arrays["folders"]),
        arrays["changed"],
        int(text["scanned"]),
        dict(text["left"]),
    )


def _join_names(names: Iterable[str]) -> np.ndarray:
    return np.frombuffer(b"\0".join(os.fsencode(name) for name in names), dtype=np.uint8)


def _split_names(joined: np.ndarray) -> tuple[str, ...]:
    return tuple(os.fsdecode(name) for name in joined.tobytes().split(b"\0"))

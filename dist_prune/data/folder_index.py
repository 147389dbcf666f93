"""The index of an image folder: names, labels and sizes of its files, scanned once and kept beside the data.

``ROOT/train.index.npz`` belongs to ROOT/train; where nothing can be written there, it is kept in the user's cache
folder ($XDG_CACHE_HOME or ~/.cache, dist_prune/). It is used again as long as no folder was changed since
(their names and times of change are compared; overwriting a file in place alters neither, so delete the index then).
"""

import hashlib
import io
import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from dist_prune.data import folder_scan
from dist_prune.data.random_access import Say
from dist_prune.errors import PruneError
from dist_prune.fileio import write_atomic

FORMAT = 2
SCANNERS = 16  # threads: on network file systems a scan is waiting, not computing
SETTLED_S = 2.0  # a folder changed so shortly before its scan may change again within the clock's grain


class Names:
    """Many names in two arrays: a million Python strings would cost each loader worker a copy of them."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        raw = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in raw], dtype=np.int64)
        return cls(np.frombuffer(b"".join(raw), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, place: int) -> str:
        place = range(len(self.ends))[place]
        start = int(self.ends[place - 1]) if place else 0
        return os.fsdecode(self.blob[start : int(self.ends[place])].tobytes())


@dataclass(frozen=True)
class FolderIndex:
    """What lies in an image folder.

    Attributes:
        names: of the files, relative to the folder; ascending by class, sub-folder, name.
        labels, sizes: (n,) class numbers and bytes.
        classes: names of the class folders, ascending.
        folders, changed: every folder that was looked into (relative; "" is the root) and its time of change, ns.
        scanned: when, ns.
        left: what was left out: a kind of name (``.txt``, ``hidden``) -> how many. Decides nothing.
    """

    names: Names
    labels: np.ndarray
    sizes: np.ndarray
    classes: tuple[str, ...]
    folders: tuple[str, ...]
    changed: np.ndarray
    scanned: int
    left: dict[str, int] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """sha256 of names, sizes, labels and classes."""
        found = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        for array in (self.names.blob, self.names.ends, self.sizes, self.labels):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def fresh(self, root: Path) -> bool:
        """Whether no folder was added, removed or changed since the scan."""
        limit = self.scanned - int(SETTLED_S * 1e9)
        try:
            times = [os.stat(root / folder).st_mtime_ns for folder in self.folders]
        except OSError:
            return False
        return bool((np.array(times) == self.changed).all()) and max(times) < limit


def index_of(root: Path, say: Say = lambda text: None) -> tuple[FolderIndex, str]:
    """The index of an image folder, from its file or from a scan, and a few words on which.

    Raises:
        PruneError: no class folders, or one without images.
    """
    for place in index_locations(root):
        found = load(place)
        if found is not None and found.fresh(root):
            return found, f"{len(found.names):,} images by {place}{folder_scan.left_out_text(found.left)}"
    say(f"data: looking through {root} (once; its index is kept)")
    start = time.perf_counter()
    found = scan(root)
    seconds = time.perf_counter() - start
    took = f"{len(found.names):,} images, scanned in {seconds:.1f} s{folder_scan.left_out_text(found.left)}"
    for place in index_locations(root):
        try:
            save(found, place)
            return found, f"{took}, index kept in {place}"
        except PruneError:  # read-only, or full: the next place
            continue
    return found, f"{took}; no place could keep the index"


def index_locations(root: Path) -> tuple[Path, Path]:
    """Where the index of a folder may lie, best first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return root.with_name(f"{root.name}.index.npz"), cache / "dist_prune" / f"{root.name}-{key}.index.npz"


def scan(root: Path) -> FolderIndex:
    """Look through all class folders (and folders in them; names that begin with a dot are left out, and counted)."""
    began = time.time_ns()
    classes, left = folder_scan.class_folders(root)
    if not classes:
        raise PruneError(folder_scan.no_classes(root))
    with ThreadPoolExecutor(SCANNERS) as pool:
        parts = list(pool.map(lambda name: folder_scan.scan_folder(root, name, ()), classes))
    empty = [name for name, found in zip(classes, parts, strict=True) if not found.files]
    if empty:
        raise PruneError(folder_scan.check_not_empty(root, empty, sum((found.left for found in parts), Counter())))
    folders = [("", os.stat(root).st_mtime_ns), *(folder for found in parts for folder in found.folders)]
    return FolderIndex(
        Names.of(name for found in parts for name, _ in found.files),
        np.repeat(np.arange(len(classes)), [len(found.files) for found in parts]),
        np.array([size for found in parts for _, size in found.files], dtype=np.int64),
        tuple(classes), tuple(name for name, _ in folders), np.array([at for _, at in folders], dtype=np.int64), began,
        dict(sum((found.left for found in parts), left)),
    )  # fmt: skip


def save(index: FolderIndex, place: Path) -> None:
    """Write an index; PruneError where it cannot be written."""
    out = io.BytesIO()
    np.savez(
        out, format=FORMAT, blob=index.names.blob, ends=index.names.ends, labels=index.labels, sizes=index.sizes,
        classes=_joined(index.classes), folders=_joined(index.folders), changed=index.changed, scanned=index.scanned,
        digest=np.frombuffer(index.digest.encode(), dtype=np.uint8),
        left=np.frombuffer(json.dumps(index.left).encode(), dtype=np.uint8),
    )  # fmt: skip
    write_atomic(place, out.getvalue())


def load(place: Path) -> FolderIndex | None:
    """The index in a file; None where there is none, or it is damaged, or of another format."""
    try:
        if not place.is_file():  # a FIFO would be waited for
            return None
        with np.load(place, allow_pickle=False) as found:
            if int(found["format"]) != FORMAT:
                return None
            index = FolderIndex(
                Names(found["blob"], found["ends"]), found["labels"], found["sizes"], _split(found["classes"]),
                _split(found["folders"]), found["changed"], int(found["scanned"]),
                json.loads(found["left"].tobytes()),
            )  # fmt: skip
            return index if found["digest"].tobytes().decode() == index.digest else None
    except Exception:  # whatever damage makes the readers of npz, of zip and of zlib stumble over
        return None


def _joined(names: Iterable[str]) -> np.ndarray:
    return np.frombuffer(b"\0".join(os.fsencode(name) for name in names), dtype=np.uint8)


def _split(joined: np.ndarray) -> tuple[str, ...]:
    return tuple(os.fsdecode(name) for name in joined.tobytes().split(b"\0"))

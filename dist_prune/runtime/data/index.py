"""The index of an image folder: names, labels and sizes of its files, scanned once and kept beside the data.

``ROOT/train.index.npz`` belongs to ROOT/train; where nothing can be written there, it is kept in the user's cache
folder ($XDG_CACHE_HOME or ~/.cache, dist_prune/). It is used again as long as no folder was changed since
(their names and times of change are compared; overwriting a file in place alters neither, so delete the index then).
"""

import errno
import hashlib
import io
import os
import stat
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dist_prune.errors import PruneError
from dist_prune.ledger import write_atomic

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
FORMAT = 1
SCANNERS = 16  # threads: on network file systems a scan is waiting, not computing
SETTLED_S = 2.0  # a folder changed so shortly before its scan may change again within the clock's grain

Say = Callable[[str], None]


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
class Index:
    """What lies in an image folder.

    Attributes:
        names: of the files, relative to the folder; ascending by class, sub-folder, name.
        labels, sizes: (n,) class numbers and bytes.
        classes: names of the class folders, ascending.
        folders, changed: every folder that was looked into (relative; "" is the root) and its time of change, ns.
        scanned: when, ns.
    """

    names: Names
    labels: np.ndarray
    sizes: np.ndarray
    classes: tuple[str, ...]
    folders: tuple[str, ...]
    changed: np.ndarray
    scanned: int

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


def index_of(root: Path, say: Say = lambda text: None) -> tuple[Index, str]:
    """The index of an image folder, from its file or from a scan, and a few words on which.

    Raises:
        PruneError: no class folders, or one without images.
    """
    for place in places(root):
        found = load(place)
        if found is not None and found.fresh(root):
            return found, f"{len(found.names):,} images by {place}"
    say(f"data: looking through {root} (once; its index is kept)")
    start = time.perf_counter()
    found = scan(root, say)
    took = f"{len(found.names):,} images, scanned in {time.perf_counter() - start:.1f} s"
    for place in places(root):
        try:
            save(found, place)
            return found, f"{took}, index kept in {place}"
        except PruneError:  # read-only, or full: the next place
            continue
    return found, f"{took}; no place could keep the index"


def places(root: Path) -> tuple[Path, Path]:
    """Where the index of a folder may lie, best first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return root.with_name(f"{root.name}.index.npz"), cache / "dist_prune" / f"{root.name}-{key}.index.npz"


def scan(root: Path, say: Say = lambda text: None) -> Index:
    """Look through all class folders (and folders in them; names that begin with a dot are left out)."""
    began = time.time_ns()
    classes = sorted(entry.name for entry in os.scandir(root) if is_folder(entry) and not entry.name.startswith("."))
    if not classes:
        raise PruneError(f"data.root: {root} has no class folders; it needs {root}/<class>/<image>")
    lefts: list[list[int]] = [[0] for _ in classes]
    with ThreadPoolExecutor(SCANNERS) as pool:
        parts = list(pool.map(lambda name, left: _within(root, name, (), left), classes, lefts))
    if left := sum(count for (count,) in lefts):
        say(f"data: {left} name(s) of images in {root} are no files (FIFO, socket, device, circular link): left out")
    empty = [name for name, (files, _) in zip(classes, parts, strict=True) if not files]
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise PruneError(
            f"data.root: the class folder {root / empty[0]}{more} holds no image ({', '.join(IMAGE_FILES)})"
        )
    folders = [("", os.stat(root).st_mtime_ns), *(folder for _, found in parts for folder in found)]
    return Index(
        Names.of(name for files, _ in parts for name, _ in files),
        np.repeat(np.arange(len(classes)), [len(files) for files, _ in parts]),
        np.array([size for files, _ in parts for _, size in files], dtype=np.int64),
        tuple(classes), tuple(name for name, _ in folders), np.array([at for _, at in folders], dtype=np.int64), began,
    )  # fmt: skip


Files = list[tuple[str, int]]
Folders = list[tuple[str, int]]


def _within(root: Path, folder: str, above: tuple[tuple[int, int], ...], left: list[int]) -> tuple[Files, Folders]:
    """(name, bytes) of the images below a folder, in order, and (name, time of change) of the folders.

    ``left`` [n] counts what is named as an image and is no file.
    """
    status = os.stat(root / folder)
    me = (status.st_dev, status.st_ino)
    if me in above:  # a link back up
        return [], []
    files: Files = []
    deeper: list[str] = []
    with os.scandir(root / folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if is_folder(entry):
                deeper.append(f"{folder}/{entry.name}")
            elif entry.name.lower().endswith(IMAGE_FILES):
                size = size_of(entry)
                if size is None:
                    left[0] += 1
                else:
                    files.append((f"{folder}/{entry.name}", size))
    files.sort()
    folders: Folders = [(folder, status.st_mtime_ns)]
    for name in sorted(deeper):
        more, seen = _within(root, name, (*above, me), left)
        files, folders = files + more, folders + seen
    return files, folders


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


def save(index: Index, place: Path) -> None:
    """Write an index; PruneError where it cannot be written."""
    out = io.BytesIO()
    np.savez(
        out, format=FORMAT, blob=index.names.blob, ends=index.names.ends, labels=index.labels, sizes=index.sizes,
        classes=_joined(index.classes), folders=_joined(index.folders), changed=index.changed, scanned=index.scanned,
        digest=np.frombuffer(index.digest.encode(), dtype=np.uint8),
    )  # fmt: skip
    write_atomic(place, out.getvalue())


def load(place: Path) -> Index | None:
    """The index in a file; None where there is none, or it is damaged, or of another format."""
    try:
        if not place.is_file():  # a FIFO would be waited for
            return None
        with np.load(place, allow_pickle=False) as found:
            if int(found["format"]) != FORMAT:
                return None
            index = Index(
                Names(found["blob"], found["ends"]), found["labels"], found["sizes"], _split(found["classes"]),
                _split(found["folders"]), found["changed"], int(found["scanned"]),
            )  # fmt: skip
            return index if found["digest"].tobytes().decode() == index.digest else None
    except Exception:  # whatever damage makes the readers of npz, of zip and of zlib stumble over
        return None


def _joined(names: Iterable[str]) -> np.ndarray:
    return np.frombuffer(b"\0".join(os.fsencode(name) for name in names), dtype=np.uint8)


def _split(joined: np.ndarray) -> tuple[str, ...]:
    return tuple(os.fsdecode(name) for name in joined.tobytes().split(b"\0"))

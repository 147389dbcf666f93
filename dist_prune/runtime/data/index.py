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
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from dist_prune.errors import PruneError
from dist_prune.ledger import write_atomic

# what Pillow decodes by itself; not formats of which it reads a header only (HDF5, MPEG) or that need programs (EPS)
IMAGE_FILES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".webp", ".avif", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga", ".pcx", ".sgi", ".ras", ".qoi", ".ico",
)  # fmt: skip
HIDDEN = "."  # names that begin with it (.ipynb_checkpoints, .DS_Store) are no images and no classes, anywhere
FORMAT = 2
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


def index_of(root: Path, say: Say = lambda text: None) -> tuple[Index, str]:
    """The index of an image folder, from its file or from a scan, and a few words on which.

    Raises:
        PruneError: no class folders, or one without images.
    """
    for place in places(root):
        found = load(place)
        if found is not None and found.fresh(root):
            return found, f"{len(found.names):,} images by {place}{left_out(found.left)}"
    say(f"data: looking through {root} (once; its index is kept)")
    start = time.perf_counter()
    found = scan(root)
    took = f"{len(found.names):,} images, scanned in {time.perf_counter() - start:.1f} s{left_out(found.left)}"
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


def scan(root: Path) -> Index:
    """Look through all class folders (and folders in them; names that begin with a dot are left out, and counted)."""
    began = time.time_ns()
    classes, left = class_folders(root)
    if not classes:
        raise PruneError(no_classes(root))
    with ThreadPoolExecutor(SCANNERS) as pool:
        parts = list(pool.map(lambda name: _within(root, name, ()), classes))
    empty = [name for name, found in zip(classes, parts, strict=True) if not found.files]
    if empty:
        raise PruneError(_empty(root, empty, sum((found.left for found in parts), Counter())))
    folders = [("", os.stat(root).st_mtime_ns), *(folder for found in parts for folder in found.folders)]
    return Index(
        Names.of(name for found in parts for name, _ in found.files),
        np.repeat(np.arange(len(classes)), [len(found.files) for found in parts]),
        np.array([size for found in parts for _, size in found.files], dtype=np.int64),
        tuple(classes), tuple(name for name, _ in folders), np.array([at for _, at in folders], dtype=np.int64), began,
        dict(sum((found.left for found in parts), left)),
    )  # fmt: skip


def class_folders(root: Path) -> tuple[list[str], Counter[str]]:
    """Names of the class folders in text order, and what lies beside them that belongs to no class."""
    classes, left = [], Counter[str]()
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith(HIDDEN):
                left["hidden"] += 1
            elif entry.is_dir():
                classes.append(entry.name)
            else:
                left[f"{_kind(entry.name)} beside the class folders"] += 1
    return sorted(classes), left


def images_below(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """The image files anywhere below a folder, as a scan finds them in a class folder, and what was left out."""
    found = _within(folder, "", ())
    return [folder / name for name, _ in found.files], dict(found.left)


def left_out(left: Mapping[str, int]) -> str:
    """What was left out, to be put behind a sentence; empty where nothing was."""
    if not left:
        return ""
    parts = [f"{count:,} {kind}" for kind, count in sorted(left.items(), key=lambda item: -item[1])]
    more = f" and {len(parts) - 6} more kinds" if len(parts) > 6 else ""
    return f"; left out, no image files of a class: {', '.join(parts[:6])}{more}"


def no_classes(root: Path) -> str:
    """What is wrong with a folder that has no folders in it."""
    loose = [entry.name for entry in os.scandir(root) if entry.name.lower().endswith(IMAGE_FILES)]
    said = f"data.root: {root} has no class folders; it needs {root}/<class>/<image>"
    return said + (f". Its {len(loose)} images lie in it directly, so nobody knows their classes" if loose else "")


def _empty(root: Path, empty: list[str], left: Mapping[str, int]) -> str:
    more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
    return (
        f"data.root: the class folder {root / empty[0]}{more} holds no image ({', '.join(IMAGE_FILES)})"
        f"{left_out(left)}. A folder that is no class must not lie beside the class folders: move it away, or name "
        "another folder with data.train_split and data.eval_split"
    )


@dataclass
class _Found:
    """What lies below a folder: (name, bytes) of the images in order, (name, time of change) of folders, the rest."""

    files: list[tuple[str, int]] = field(default_factory=list)
    folders: list[tuple[str, int]] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)


def _within(root: Path, folder: str, above: tuple[tuple[int, int], ...]) -> _Found:
    status = os.stat(root / folder)
    me, found = (status.st_dev, status.st_ino), _Found()
    if me in above:  # a link back up
        return found
    deeper: list[str] = []
    with os.scandir(root / folder) as entries:
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(HIDDEN):
                found.left["hidden"] += 1
            elif entry.is_dir():
                deeper.append(name)
            elif entry.name.lower().endswith(IMAGE_FILES):
                found.files.append((name, _size(entry)))
            else:
                found.left[_kind(entry.name)] += 1
    found.files.sort()
    found.folders.append((folder, status.st_mtime_ns))
    for name in sorted(deeper):
        more = _within(root, name, (*above, me))
        found.files += more.files
        found.folders += more.folders
        found.left += more.left
    return found


def _kind(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nowhere: listed, and reported when it is read
        return -1


def save(index: Index, place: Path) -> None:
    """Write an index; PruneError where it cannot be written."""
    out = io.BytesIO()
    np.savez(
        out, format=FORMAT, blob=index.names.blob, ends=index.names.ends, labels=index.labels, sizes=index.sizes,
        classes=_joined(index.classes), folders=_joined(index.folders), changed=index.changed, scanned=index.scanned,
        digest=np.frombuffer(index.digest.encode(), dtype=np.uint8),
        left=np.frombuffer(json.dumps(index.left).encode(), dtype=np.uint8),
    )  # fmt: skip
    write_atomic(place, out.getvalue())


def load(place: Path) -> Index | None:
    """The index in a file; None where there is none, or it is damaged, or of another format."""
    try:
        with np.load(place, allow_pickle=False) as found:
            if int(found["format"]) != FORMAT:
                return None
            index = Index(
                Names(found["blob"], found["ends"]), found["labels"], found["sizes"], _split(found["classes"]),
                _split(found["folders"]), found["changed"], int(found["scanned"]),
                json.loads(found["left"].tobytes()),
            )  # fmt: skip
            return index if found["digest"].tobytes().decode() == index.digest else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _joined(names: Iterable[str]) -> np.ndarray:
    return np.frombuffer(b"\0".join(os.fsencode(name) for name in names), dtype=np.uint8)


def _split(joined: np.ndarray) -> tuple[str, ...]:
    return tuple(os.fsdecode(name) for name in joined.tobytes().split(b"\0"))

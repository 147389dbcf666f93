"""Index of tar shards: where each image lies, its label and its name; read once and saved.

Shards are uncompressed tar files. Two conventions are read, and recognised by the members:

- WebDataset's: a sample is the members that share a name up to the first dot, ``0001.jpg`` and ``0001.cls`` (or
  ``0001.json`` with the number under ``label``). It has one image: of several, the one without a second dot in its
  name, then that of the form that comes first in ``IMAGE_FILES``, so ``0001.jpg`` before ``0001.png`` and
  ``0001.mask.jpg``. The others are counted as left out;
- folders: ``<class>/<image>``, as of a packed image folder; the last folder is the class.

The index lies beside the first shard, or in the user's cache folder ($XDG_CACHE_HOME or ~/.cache, dist_prune/) if that
is read-only. It is used again while names, sizes and modification times of the shards are the same.
"""

import hashlib
import json
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dist_prune.data import index_store
from dist_prune.data.folder_index import Names
from dist_prune.data.folder_scan import HIDDEN, IMAGE_FILES, left_out_text
from dist_prune.data.random_access import Say
from dist_prune.distributed.cpu_count import cores
from dist_prune.errors import PruneError

KIND = "tar-3"
LABEL_KEYS = ("label", "cls", "class", "target", "class_id", "label_id")  # of a sample's .json, the first that is there
PARALLEL_BYTES = 256 << 20  # shards of that size together are read by several processes
BLOCK = 512  # of a tar file
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True)
class TarIndex:
    """Images of one split's shards, in the order of the shards and of the members in them.

    Attributes:
        shards: paths of the shards.
        stamps: (shards, 2) int64, size in bytes and modification time in nanoseconds of each.
        shard_of: (n,) int32 shard of each image.
        offsets: (n,) int64 position of its first byte.
        sizes: (n,) int64 bytes.
        labels: (n,) int64 class numbers.
        names: names of the members, by sample id.
        classes: class names in the order of their numbers.
        numbered: whether labels were numbers in the shards; then class names are those numbers.
        left_out: kind of name -> number of members that are not images. For messages only.
    """

    shards: tuple[str, ...]
    stamps: np.ndarray
    shard_of: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    names: Names
    classes: tuple[str, ...]
    numbered: bool
    left_out: dict[str, int] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """sha256 of names, sizes, labels and classes; the place of the shards does not change it."""
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        for array in (self.names.blob, self.names.ends, self.sizes, self.labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass
class _Shard:
    """What one shard holds: parallel lists by image."""

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int | str | None] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def load_or_read(shards: Sequence[Path], split: str, say: Say = lambda text: None) -> tuple[TarIndex, str]:
    """Load the index of tar shards, or read the headers of all their members and save it.

    Args:
        shards: the files of one split, in order.
        split: name of the split, for the file's name.
        say: takes a line for the user before the shards are read.

    Returns:
        The index, and a text about where it came from.

    Raises:
        PruneError: a shard is damaged, cut short or compressed, a sample has no label, or a name occurs twice.
    """
    stamps = _stamps(shards)
    locations = index_locations(shards, split)
    for path in locations:
        index = load(path)
        if index is not None and index.shards == tuple(map(str, shards)) and np.array_equal(index.stamps, stamps):
            return index, f"{len(index.names):,} images by {path}{left_out_text(index.left_out)}"
    say(f"data: reading the members of {len(shards)} tar shards (once; the index is kept)")
    start = time.perf_counter()
    index = read(shards, stamps)
    summary = (
        f"{len(index.names):,} images in {len(shards)} shards, read in {time.perf_counter() - start:.1f} s"
        f"{left_out_text(index.left_out)}"
    )
    kept = index_store.save_first(index, locations, save)
    return index, f"{summary}, index kept in {kept}" if kept else f"{summary}; the index could not be saved"


def index_locations(shards: Sequence[Path], split: str) -> tuple[Path, Path]:
    """Paths at which the index of these shards may be saved, best first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(b"\0".join(os.fsencode(path.resolve()) for path in shards)).hexdigest()[:16]
    name = f"{split.replace(os.sep, '_')}-{key}.tar-index.npz"
    return shards[0].parent / name, cache / "dist_prune" / name


def read(shards: Sequence[Path], stamps: np.ndarray | None = None) -> TarIndex:
    """Read the headers of all members.

    Args:
        shards: the files of one split, in order.
        stamps: their sizes and times before the reading.

    Raises:
        PruneError: see ``load_or_read``.
    """
    stamps = _stamps(shards) if stamps is None else stamps
    workers = min(len(shards), cores())
    if workers > 1 and int(stamps[:, 0].sum()) > PARALLEL_BYTES:
        with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
            parts = list(pool.map(read_shard, shards))
    else:
        parts = [read_shard(path) for path in shards]
    names = [name for part in parts for name in part.names]
    if not names:
        left_out = sum((part.left_out for part in parts), Counter[str]())
        raise PruneError(
            f"data.root: there is no image in {shards[0]}{_others(shards)} ({', '.join(IMAGE_FILES[:5])} ...)"
            f"{left_out_text(left_out)}"
        )
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        holders = [str(path) for path, part in zip(shards, parts, strict=True) if twice in part.names]
        raise PruneError(
            f"data.root: {twice!r} is in {' and in '.join(dict.fromkeys(holders))}"
            f"{' twice' if len(set(holders)) == 1 else ''}: the same images would count twice"
        )
    labels, classes, numbered = _number([label for part in parts for label in part.labels], names)
    return TarIndex(
        tuple(map(str, shards)),
        stamps,
        np.repeat(np.arange(len(shards), dtype=np.int32), [len(part.names) for part in parts]),
        np.array([offset for part in parts for offset in part.offsets], dtype=np.int64),
        np.array([size for part in parts for size in part.sizes], dtype=np.int64),
        labels,
        Names.from_names(names),
        classes,
        numbered,
        dict(sum((part.left_out for part in parts), Counter[str]())),
    )


def read_shard(path: Path) -> _Shard:
    """Read the headers of one shard's members, and its labels.

    Raises:
        PruneError: it is no tar file, or it ends early.
    """
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            members = [member for member in archive if member.isfile()]
            _check_end(path, members, size)
            return _samples(path, archive, members)
    except (tarfile.TarError, EOFError) as error:
        what = f"{error}; it was cut short, or is none"
        if _compressed(path):
            what = "it is compressed: unpack it"
        raise PruneError(f"data.root: the shard {path} cannot be read as an uncompressed tar file: {what}") from error
    except OSError as error:
        raise PruneError(f"data.root: the shard {path} cannot be read: {error}") from error


def _samples(path: Path, archive: tarfile.TarFile, members: Sequence[tarfile.TarInfo]) -> _Shard:
    shard, labels = _Shard(), dict[str, int | str]()
    images = []
    for member in members:
        name = PurePosixPath(member.name).name
        if name.startswith(HIDDEN):
            shard.left_out["hidden"] += 1
        elif name.lower().endswith(IMAGE_FILES):
            images.append(member)
        elif name.endswith((".cls", ".json")):
            stream = archive.extractfile(member)
            assert stream is not None  # a regular file
            label = _label_of(stream.read(), name)
            if label is not None:
                labels[_key(member.name)] = label
        else:
            shard.left_out[os.path.splitext(name)[1].lower() or "without a suffix"] += 1
    if labels:
        images = _one_of_each_sample(path, images, shard.left_out)
        unused = labels.keys() - {_key(member.name) for member in images}
        shard.left_out.update({"labels without an image": len(unused)} if unused else {})
    for member in images:
        folder = PurePosixPath(member.name).parent.name
        shard.labels.append(labels.get(_key(member.name)) if labels else (folder or None))
        shard.names.append(member.name.removeprefix("./"))
        shard.offsets.append(member.offset_data)
        shard.sizes.append(member.size)
        if shard.labels[-1] is None:
            raise PruneError(
                f"data.root: {member.name} in {path} has no label: neither {_key(member.name)}.cls nor .json with "
                f"{' or '.join(LABEL_KEYS[:3])} lies beside it, and it is in no class folder"
            )
    return shard


def _one_of_each_sample(path: Path, images: Sequence[tarfile.TarInfo], left_out: Counter[str]) -> list[tarfile.TarInfo]:
    """The image of each of WebDataset's samples, in the order of the members; counts the others in ``left_out``."""
    samples: dict[str, list[tarfile.TarInfo]] = {}
    for member in images:
        samples.setdefault(_key(member.name), []).append(member)
    chosen = []
    for own in samples.values():
        ranked = sorted(own, key=_rank)
        if len(own) > 1 and _rank(ranked[0]) == _rank(ranked[1]):
            raise PruneError(
                f"data.root: {path} has {ranked[0].name} and {ranked[1].name} in one sample (the names up to the first "
                f"dot are the same): which is the image to classify cannot be told. Name it {_key(own[0].name)}.jpg"
            )
        chosen.append(ranked[0])
        left_out.update(f".{_suffix(member.name)} beside the sample's image" for member in ranked[1:])
    return sorted(chosen, key=lambda member: member.offset_data)


def _rank(member: tarfile.TarInfo) -> tuple[bool, int]:
    """The smaller, the rather it is a sample's image: a name with one dot first, then the form."""
    suffix = _suffix(member.name).lower()
    return "." in suffix, -1 if "." in suffix else IMAGE_FILES.index(f".{suffix}")


def _key(name: str) -> str:
    """WebDataset's key of a member: its path up to the first dot of its name."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.split(".", 1)[0]))


def _suffix(name: str) -> str:
    return PurePosixPath(name).name.split(".", 1)[1]


def _label_of(content: bytes, name: str) -> int | str | None:
    """The label in a ``.cls`` or ``.json`` member; None if there is none."""
    text = content.decode("utf-8", errors="replace").strip()
    if name.endswith(".cls"):
        return int(text) if _NUMBER.fullmatch(text) else text or None
    try:
        body = json.loads(text)
    except ValueError:
        return None
    found: Any = next((body[key] for key in LABEL_KEYS if key in body), None) if isinstance(body, dict) else None
    return found if isinstance(found, int | str) and not isinstance(found, bool) else None


def _number(labels: Sequence[int | str | None], names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """Class numbers, class names, and whether the labels were numbers."""
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        other = next(i for i, label in enumerate(labels) if type(label) is not type(labels[0]))
        raise PruneError(
            f"data.root: {names[0]} has the label {labels[0]!r} and {names[other]} has {labels[other]!r}: either all "
            "labels are class numbers or all are class names"
        )
    if kinds == {int}:
        known = [label for label in labels if isinstance(label, int)]
        low, high = min(known), max(known)
        if low < 0:
            raise PruneError(
                f"data.root: {names[known.index(low)]} has the label {low}; class numbers start at 0. -1 often marks "
                "images whose classes are not published: leave such images out"
            )
        if high >= max(10_000, 2 * len(known)):
            raise PruneError(
                f"data.root: {names[known.index(high)]} has the label {high}, far more than the {len(known):,} images: "
                "it is no class number"
            )
        numbers = np.array(known, dtype=np.int64)
        return numbers, tuple(map(str, range(int(numbers.max()) + 1))), True
    classes = tuple(sorted({str(label) for label in labels}))
    number = {name: index for index, name in enumerate(classes)}
    return np.array([number[str(label)] for label in labels], dtype=np.int64), classes, False


def _check_end(path: Path, members: Sequence[tarfile.TarInfo], size: int) -> None:
    """PruneError if the file ends within a member, or without the two blocks of zeros that end a tar file."""
    last = max((member.offset_data + member.size for member in members), default=0)
    if last > size:
        cut = next(member for member in members if member.offset_data + member.size > size)
        raise PruneError(f"data.root: the shard {path} ends within {cut.name}: it was cut short; copy it again")
    with path.open("rb") as file:
        file.seek(max(size - 2 * BLOCK, 0))
        if any(file.read()):
            raise PruneError(
                f"data.root: the shard {path} ends without the mark that ends a tar file: it was cut short, or is "
                "still being written"
            )


def _compressed(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(6)
    return start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


def _others(shards: Sequence[Path]) -> str:
    return f" and {len(shards) - 1} other shards" if len(shards) > 1 else ""


def _stamps(shards: Sequence[Path]) -> np.ndarray:
    try:
        return np.array([(s.st_size, s.st_mtime_ns) for s in (path.stat() for path in shards)], dtype=np.int64)
    except OSError as error:
        raise PruneError(f"data.root: a shard cannot be read: {error}") from error


def save(index: TarIndex, path: Path) -> None:
    """Write an index to a file; raises a PruneError if that fails."""
    arrays = {name: getattr(index, name) for name in ("stamps", "shard_of", "offsets", "sizes", "labels")}
    text = {name: getattr(index, name) for name in ("shards", "classes", "numbered", "left_out")}
    index_store.save(path, KIND, {**arrays, "blob": index.names.blob, "ends": index.names.ends}, text, index.digest)


def load(path: Path) -> TarIndex | None:
    """Read the index in a file; None if there is none, or if it is damaged or of another format."""
    return index_store.load(path, KIND, _from_store)


def _from_store(arrays: Mapping[str, np.ndarray], text: dict[str, Any]) -> TarIndex:
    """Raises a ValueError if an image would lie outside of its shard."""
    index = TarIndex(
        tuple(text["shards"]),
        arrays["stamps"],
        arrays["shard_of"],
        arrays["offsets"],
        arrays["sizes"],
        arrays["labels"],
        Names(arrays["blob"], arrays["ends"]),
        tuple(text["classes"]),
        bool(text["numbered"]),
        dict(text["left_out"]),
    )
    counts = {len(part) for part in (index.names, index.shard_of, index.offsets, index.sizes, index.labels)}
    if len(counts) > 1 or not bool((index.offsets + index.sizes <= index.stamps[index.shard_of, 0]).all()):
        raise ValueError("the parts of the index do not fit together")
    return index

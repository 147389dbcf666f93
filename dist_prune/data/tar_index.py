"""Index of tar shards: where each image lies, its label and its name; read once and saved.

Shards are uncompressed tar files. Two conventions are read, and recognised by the members:

- WebDataset's: a sample is the members that share a name up to the first dot, ``0001.jpg`` and ``0001.cls`` or
  ``0001.json`` with the class under ``label`` (``.cls`` counts where there are both). It has one image: of several,
  the one without a second dot in its name, then that of the form that comes first in ``IMAGE_FILES``, so ``0001.jpg``
  before ``0001.png`` and ``0001.mask.jpg``. The others are counted as left out;
- folders: ``<class>/<image>``, as of a packed image folder; the last folder is the class.

The index lies beside the first shard, or in the user's cache folder ($XDG_CACHE_HOME or ~/.cache, dist_prune/) if that
is read-only. It is used again while names, sizes and modification times of the shards are the same.
"""

import hashlib
import os
import posixpath
import tarfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from dist_prune.data import index_store
from dist_prune.data.folder_index import Names
from dist_prune.data.folder_scan import HIDDEN, IMAGE_FILES, left_out_text
from dist_prune.data.random_access import Say
from dist_prune.data.shard_labels import LABEL_FILES, StoredLabel, class_numbers, no_label, read_label
from dist_prune.distributed.cpu_count import cores
from dist_prune.errors import PruneError
from dist_prune.fileio import user_cache

KIND = "tar-4"
PARALLEL_BYTES = 256 << 20  # shards of that size together are read by several processes
BLOCK = 512  # of a tar file


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


class _Image(NamedTuple):
    """An image of a shard: the name of its member, and where its bytes lie, which are those of another for a link."""

    name: str
    offset: int
    size: int


@dataclass
class _Shard:
    """What one shard holds: parallel lists by image."""

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int | str] = field(default_factory=list)
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
    key = hashlib.sha256(b"\0".join(os.fsencode(path.resolve()) for path in shards)).hexdigest()[:16]
    name = f"{split.replace(os.sep, '_')}-{key}.tar-index.npz"
    return shards[0].parent / name, user_cache() / name


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
    labels, classes, numbered = class_numbers([label for part in parts for label in part.labels], names)
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
            members = archive.getmembers()
            _check_end(path, members, archive.offset, size)
            return _samples(path, archive, members)
    except (tarfile.TarError, EOFError) as error:
        what = f"{error}; it was cut short, or is none"
        if _compressed(path):
            what = "it is compressed: unpack it"
        raise PruneError(f"data.root: the shard {path} cannot be read as an uncompressed tar file: {what}") from error
    except OSError as error:
        raise PruneError(f"data.root: the shard {path} cannot be read: {error}") from error


def _samples(path: Path, archive: tarfile.TarFile, members: Sequence[tarfile.TarInfo]) -> _Shard:
    shard, labels, images = _Shard(), dict[str, StoredLabel](), list[_Image]()
    stored = {posixpath.normpath(member.name): member for member in members if member.isfile()}
    for member in members:
        name = PurePosixPath(member.name).name
        kind = name.lower()
        if not (member.isfile() or member.islnk() or member.issym()):
            continue  # a folder
        if name.startswith(HIDDEN):
            shard.left_out["hidden"] += 1
        elif not kind.endswith((*IMAGE_FILES, *LABEL_FILES)):
            shard.left_out[os.path.splitext(name)[1].lower() or "without a suffix"] += 1
        elif (held := member if member.isfile() else stored.get(_target(member))) is None:
            shard.left_out["links to files that are not in the shard"] += 1
        elif held.sparse is not None:
            raise PruneError(
                f"data.root: {held.name} in {path} is stored as a sparse file, in pieces: pack the shard again without "
                "tar's option --sparse (-S)"
            )
        elif kind.endswith(IMAGE_FILES):
            images.append(_Image(member.name, held.offset_data, held.size))
        else:
            stream = archive.extractfile(held)
            assert stream is not None  # a regular file
            key = _key(member.name)
            try:
                labels[key] = read_label(stream.read(), name).preferred(labels.get(key))
            except ValueError as error:
                raise PruneError(f"data.root: {member.name} in {path}: {error}") from error
    known = {key for key, label in labels.items() if label.value is not None}
    unused = known - {_key(image.name) for image in images}
    in_labels = known != unused  # a .json about the whole shard is no sample's
    if in_labels:
        images = _one_of_each_sample(path, images, shard.left_out)
    shard.left_out.update({"labels without an image": len(unused)} if unused else {})
    for image in images:
        own = labels.get(_key(image.name))
        folder = PurePosixPath(image.name).parent.name
        label = (own and own.value) if in_labels else (folder or None)
        if label is None:
            raise no_label(path, image.name, _key(image.name), own.problem if own else "", in_labels)
        shard.labels.append(label)
        shard.names.append(image.name.removeprefix("./"))
        shard.offsets.append(image.offset)
        shard.sizes.append(image.size)
    return shard


def _target(member: tarfile.TarInfo) -> str:
    """Name of the member that a link is to: a hard link's from the shard's root, a symbolic one's from its folder."""
    folder = posixpath.dirname(member.name) if member.issym() else ""
    return posixpath.normpath(posixpath.join(folder, member.linkname))


def _one_of_each_sample(path: Path, images: Sequence[_Image], left_out: Counter[str]) -> list[_Image]:
    """The image of each of WebDataset's samples, in the order of the members; counts the others in ``left_out``."""
    samples: dict[str, list[_Image]] = {}
    for image in images:
        samples.setdefault(_key(image.name), []).append(image)
    chosen = set[_Image]()
    for own in samples.values():
        ranked = sorted(own, key=_rank)
        if len(own) > 1 and _rank(ranked[0]) == _rank(ranked[1]):
            raise PruneError(
                f"data.root: {path} has {ranked[0].name} and {ranked[1].name} in one sample (the names up to the first "
                f"dot are the same): which is the image to classify cannot be told. Name it {_key(own[0].name)}.jpg"
            )
        chosen.add(ranked[0])
        left_out.update(f".{_suffix(image.name)} beside the sample's image" for image in ranked[1:])
    return [image for image in images if image in chosen]


def _rank(image: _Image) -> tuple[bool, int]:
    """The smaller, the rather it is a sample's image: a name with one dot first, then the form."""
    suffix = _suffix(image.name).lower()
    return "." in suffix, -1 if "." in suffix else IMAGE_FILES.index(f".{suffix}")


def _key(name: str) -> str:
    """WebDataset's key of a member: its path up to the first dot of its name."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.split(".", 1)[0]))


def _suffix(name: str) -> str:
    return PurePosixPath(name).name.split(".", 1)[1]


def _check_end(path: Path, members: Sequence[tarfile.TarInfo], end: int, size: int) -> None:
    """PruneError if a tar file is not whole: from the end of its last member on it has zeros alone.

    tarfile takes a damaged header for the end, and reads no further than the first of several files that were joined.

    Args:
        path: the file.
        members: what was read of it.
        end: position at which the reading ended.
        size: bytes of the file.
    """
    whole = [member for member in members if member.isfile() and member.sparse is None]
    cut = next((member for member in whole if member.offset_data + member.size > size), None)
    if cut is not None:
        raise PruneError(f"data.root: the shard {path} ends within {cut.name}: it was cut short; copy it again")
    with path.open("rb") as file:
        file.seek(end)
        mark = file.read(BLOCK)
        if len(mark) < BLOCK:
            raise PruneError(
                f"data.root: the shard {path} ends without the mark that ends a tar file: it was cut short, or is "
                "still being written"
            )
        last = f"after {members[-1].name}" if members else "at its start"
        if any(mark):
            raise PruneError(
                f"data.root: the shard {path} is damaged at byte {end:,}, {last}: what should be the name and size of "
                "the next member is none, so the rest cannot be read. Copy or pack it again"
            )
        while block := file.read(1 << 20):
            if any(block):
                raise PruneError(
                    f"data.root: the shard {path} goes on after the mark that ends a tar file ({last}), as files that "
                    "were joined with cat do: name them one by one, or join them with 'tar -A'"
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

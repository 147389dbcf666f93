"""Images in tar shards, read at any sample id by one positioned read: no unpacking, no order forced by the files."""

import os
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dist_prune.data.random_access import SplitSpec
from dist_prune.data.shard_names import shard_files, shard_paths
from dist_prune.data.source_forms import DecodedImages, StoredFiles
from dist_prune.data.tar_index import TarIndex, load_or_read
from dist_prune.errors import PruneError

OPEN_SHARDS = 256  # files that one process keeps open, below the usual limit of 1,024
_Key = tuple[int, str, bytes]  # process, path, size and time: a shard that was replaced is opened anew
_open: OrderedDict[_Key, int] = OrderedDict()  # -> file descriptor


@dataclass(frozen=True)
class TarSource(DecodedImages):
    """Image files in the shards of one split; decoded to RGB when they are loaded.

    Attributes:
        index: where each image lies.
        labels: (n,) int64 class numbers.
        classes: class names in the order of their numbers.
        digest: of names, sizes, labels and classes.
        note: where the list of images came from, and what was left out.
        numbering: see ``DecodedImages``.
        copies: paths of copies of the shards that are read instead of them; empty: none.
    """

    index: TarIndex
    labels: np.ndarray
    classes: tuple[str, ...]
    digest: str
    note: str = ""
    numbering: str = ""
    copies: tuple[str, ...] = ()

    @property
    def numbered(self) -> bool:
        """Whether the shards hold class numbers, so that class names are those numbers."""
        return self.index.numbered

    def location(self, sample: int) -> str:
        """Shard and member of a sample, for messages."""
        return f"{self.index.shards[self.index.shard_of[sample]]}:{self.index.names[sample]}"

    def fetch(self, sample: int) -> bytes:
        """The bytes of the sample's image file.

        Raises:
            ValueError: the shard is shorter or longer than when it was indexed.
            OSError: the shard cannot be read.
        """
        number = int(self.index.shard_of[sample])
        shard = (self.copies or self.index.shards)[number]
        size, offset = int(self.index.sizes[sample]), int(self.index.offsets[sample])
        content = os.pread(_descriptor(shard, self.index.stamps[number].tobytes()), size, offset)
        if len(content) < size:
            raise ValueError(f"{shard} is shorter than when it was indexed: it was cut short or replaced")
        return content

    def stored_files(self) -> StoredFiles:
        """The shards."""
        return shard_files(self.index.shards, self.index.stamps)

    def read_from(self, folder: Path) -> "TarSource":
        """The same images, read from copies of the shards in ``folder``."""
        return replace(self, copies=tuple(str(folder / name) for name in self.stored_files().names))


def open_tar(spec: SplitSpec) -> TarSource:
    """Open the shards of one split.

    Raises:
        PruneError: no shards, damaged ones, or images without labels.
    """
    if spec.root is None:
        raise PruneError("data.root: 'tar' needs its shards; write data.root='/data/imagenet-{train,val}-*.tar'")
    shards = shard_paths(spec.root, spec.split, spec.train, ".tar", spec.other_split)
    index, note = load_or_read(shards, spec.split, spec.say)
    return TarSource(index, index.labels, index.classes, index.digest, note)


def _descriptor(path: str, stamp: bytes) -> int:
    """The open file of a shard in this process; a worker that was forked opens its own."""
    key = (os.getpid(), path, stamp)
    if key in _open:
        _open.move_to_end(key)
        return _open[key]
    if len(_open) >= OPEN_SHARDS:
        os.close(_open.popitem(last=False)[1])
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    indexed = int(np.frombuffer(stamp, dtype=np.int64)[0])
    if (size := os.fstat(handle).st_size) > indexed:
        os.close(handle)
        raise ValueError(f"{path} has {size:,} bytes and had {indexed:,} when it was indexed: it was replaced")
    _open[key] = handle
    return handle

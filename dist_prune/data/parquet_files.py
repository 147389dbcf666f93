"""Images in parquet files, as Hugging Face's datasets write them: a column of ``{bytes, path}`` and a column of labels.

An image is stored in a row group with hundreds of others, and reading one of them means reading all of the group. So
images in the order of the files are quick, and images in random order are slow: ``dist-prune pack`` makes tar shards.
"""

import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_prune.data.random_access import SplitSpec
from dist_prune.data.shard_names import shard_files, shard_paths
from dist_prune.data.source_forms import DecodedImages, StoredFiles
from dist_prune.errors import PruneError, import_problem

if TYPE_CHECKING:
    from pyarrow import parquet

GROUPS_KEPT = 2  # row groups in memory per process
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "jpg", "png", "webp"), ("label", "labels", "cls", "fine_label", "class")
BYTES = ("binary", "large_binary", "binary_view", "null")  # Arrow's types that may hold image files
_groups: OrderedDict[tuple[str, int, int], list[Any]] = OrderedDict()  # (path, its time, row group) -> its images


@dataclass(frozen=True)
class ParquetSource(DecodedImages):
    """Image files in the rows of one split's parquet files. Sample ids are the order of the files and of their rows.

    Attributes:
        files: paths of the parquet files.
        times: (files,) int64 modification times in nanoseconds, when they were opened.
        columns: name of the column of images in each file.
        group_file: (groups,) number of the file of each row group.
        group_number: (groups,) number of the row group in its file.
        group_ends: (groups,) first sample id after each row group.
        labels: (n,) int64 class numbers.
        classes: class names in the order of their numbers.
        digest: of sizes of the files' columns, labels and classes.
        numbered: whether the files name no classes, so that class names are their numbers.
        numbering: see ``DecodedImages``.
        copies: paths of copies of the files that are read instead of them; empty: none.
    """

    files: tuple[str, ...]
    times: np.ndarray
    columns: tuple[str, ...]
    group_file: np.ndarray
    group_number: np.ndarray
    group_ends: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    digest: str
    numbered: bool
    numbering: str = ""
    copies: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """How the images are read, for the log."""
        return (
            f"{len(self.labels):,} images in {len(self.files)} parquet files, {len(self.group_ends)} row groups; a "
            "random image costs a row group: 'dist-prune pack' makes shards for training"
        )

    def location(self, sample: int) -> str:
        """File and row of a sample, for messages."""
        group, row = self._place(sample)
        return f"{self.files[self.group_file[group]]}: row group {self.group_number[group]}, row {row}"

    def fetch(self, sample: int) -> bytes:
        """The bytes of the sample's image file.

        Raises:
            ValueError: the row holds no bytes.
            OSError: the file cannot be read.
        """
        group, row = self._place(sample)
        number, column = int(self.group_file[group]), self.columns[self.group_file[group]]
        path, own = (self.copies or self.files)[number], int(self.group_number[group])
        key = (path, int(self.times[number]), own)
        if key not in _groups:
            while len(_groups) >= GROUPS_KEPT:
                _groups.popitem(last=False)
            file = _open(path)
            rows = int(self.group_ends[group]) - (int(self.group_ends[group - 1]) if group else 0)
            if own >= file.num_row_groups or file.metadata.row_group(own).num_rows != rows:
                raise ValueError(f"{path} has other rows than when it was opened: it was replaced")
            _groups[key] = file.read_row_group(own, columns=[column])[column].to_pylist()
        _groups.move_to_end(key)
        stored = _groups[key][row]
        content = stored.get("bytes") if isinstance(stored, dict) else stored
        if not isinstance(content, bytes) or not content:
            raise ValueError("the row holds no bytes of an image, only a path" if stored else "the row is empty")
        return content

    def stored_files(self) -> StoredFiles:
        """The parquet files."""
        try:
            stats = [os.stat(file) for file in self.files]
        except OSError as error:
            raise PruneError(f"data.root: a parquet file cannot be read: {error}") from error
        return shard_files(self.files, np.array([(one.st_size, one.st_mtime_ns) for one in stats], dtype=np.int64))

    def read_from(self, folder: Path) -> "ParquetSource":
        """The same images, read from copies of the files in ``folder``."""
        return replace(self, copies=tuple(str(folder / name) for name in self.stored_files().names))

    def _place(self, sample: int) -> tuple[int, int]:
        group = int(np.searchsorted(self.group_ends, sample, side="right"))
        return group, sample - (int(self.group_ends[group - 1]) if group else 0)


def open_parquet(spec: SplitSpec) -> ParquetSource:
    """Open the parquet files of one split. The labels are read, the images are not.

    Raises:
        PruneError: pyarrow is missing, a file is damaged, or it has no columns of images and labels.
    """
    if spec.root is None:
        raise PruneError(
            "data.root: 'parquet' needs its files; write data.root='/data/imagenet/data/{split}-*.parquet'"
        )
    paths = shard_paths(spec.root, spec.split, spec.train, ".parquet", spec.other_split)
    labels, file_of, number_of, ends, names, image_columns = [], [], [], [], None, []
    whole = hashlib.sha256()
    times = np.array([path.stat().st_mtime_ns for path in paths], dtype=np.int64)
    for index, path in enumerate(paths):
        file = _open(str(path))
        label = _column(path, file, LABEL_COLUMNS, "labels")
        image_columns.append(_image_column(path, file))
        own = _class_names(file, label)
        if own and names and own != names:
            first = next(
                (n for n, (a, b) in enumerate(zip(own, names, strict=False)) if a != b), min(len(own), len(names))
            )
            raise PruneError(
                f"data.root: {path} has other class names than {paths[0]}, from number {first} on: its labels mean "
                "other classes. Write the files anew with one order of the classes"
            )
        names = names or own
        labels.append(_label_values(path, file, label))
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group)
            file_of.append(index)
            number_of.append(group)
            ends.append((ends[-1] if ends else 0) + rows.num_rows)
            whole.update(np.array([rows.num_rows, rows.total_byte_size], dtype=np.int64).tobytes())
    held = [part for part in labels if len(part)] or labels[:1]  # a file without rows need not know their type
    if len({part.dtype.kind for part in held}) > 1:
        raise PruneError(
            f"data.root: some of the {len(paths)} files hold class numbers and some class names ({paths[0]} holds "
            f"{'names' if labels[0].dtype.kind == 'U' else 'numbers'}): all need the same"
        )
    numbers = np.concatenate(held)
    named = numbers.dtype.kind == "U"
    if named:  # class names, numbered in text order as folders are
        found, numbers = np.unique(numbers, return_inverse=True)
        names, numbers = tuple(found.tolist()), numbers.astype(np.int64)
    most = max(10_000, 2 * len(numbers)) if names is None else len(names)
    if len(wrong := np.flatnonzero((numbers < 0) | (numbers >= most))):
        place = int(wrong[0])
        file = int(np.searchsorted(np.cumsum([len(part) for part in labels]), place, side="right"))
        row = place - sum(len(part) for part in labels[:file])
        why = f"and the metadata name {most} classes (numbers from 0)"
        if numbers[place] < 0:
            why = "class numbers start at 0; Hugging Face marks with -1 test images whose classes are not published"
        elif names is None:
            why = f"far more than the {len(numbers):,} images: it is no class number"
        raise PruneError(f"data.root: row {row} of {paths[file]} has the label {numbers[place]}, {why}")
    classes = names or tuple(map(str, range(int(numbers.max(initial=0)) + 1)))
    whole.update(numbers.tobytes() + "\0".join(classes).encode())
    return ParquetSource(
        tuple(map(str, paths)), times, tuple(image_columns), np.array(file_of), np.array(number_of),
        np.array(ends, dtype=np.int64), numbers, classes, whole.hexdigest(), names is None,
    )  # fmt: skip


def _label_values(path: Path, file: "parquet.ParquetFile", label: str) -> np.ndarray:
    """The labels of a file: (rows,) int64 class numbers or texts.

    Raises:
        PruneError: the column holds neither, or a row has none.
    """
    from pyarrow import ArrowException

    try:
        column = file.read(columns=[label])[label]
    except (OSError, ArrowException) as error:
        raise PruneError(
            f"data.root: the column {label!r} of {path} cannot be read: {' '.join(str(error).split())}. The file is "
            "damaged: copy it again"
        ) from error
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise PruneError(f"data.root: row {row} of {path} has no value in the column {label!r}")
    values = column.to_numpy()
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    if all(isinstance(value, str) for value in values):
        return values.astype(np.str_)
    raise PruneError(
        f"data.root: the column {label!r} of {path} holds {column.type}, neither class numbers nor class names: write "
        "the files with one class for each image"
    )


def _open(path: str) -> "parquet.ParquetFile":
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise import_problem(error, "data.source: 'parquet' needs pyarrow", "parquet") from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise PruneError(f"data.root: {path} cannot be read as a parquet file: {error}") from error


def _image_column(path: Path, file: "parquet.ParquetFile") -> str:
    """Name of the column of images.

    Raises:
        PruneError: there is none, or it holds something else than the bytes of files.
    """
    name = _column(path, file, IMAGE_COLUMNS, "images")
    kind: Any = file.schema_arrow.field(name).type
    fields = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
    if file.metadata.num_rows and str(fields.get("bytes", kind)) not in BYTES:
        raise PruneError(
            f"data.root: the column {name!r} of {path} holds {kind}, not the bytes of image files: write it as binary "
            "or {bytes, path} (datasets.Image does, with the files embedded)"
        )
    return name


def _column(path: Path, file: "parquet.ParquetFile", known: tuple[str, ...], what: str) -> str:
    columns = file.schema_arrow.names
    found = next((name for name in known if name in columns), None)
    if found is None:
        raise PruneError(
            f"data.root: {path} has the columns {', '.join(columns)}, and none of {', '.join(known)}, the names that a "
            f"column of {what} may have: rename it (pyarrow: table.rename_columns)"
        )
    return found


def _class_names(file: "parquet.ParquetFile", label: str) -> tuple[str, ...] | None:
    """Class names of Hugging Face's metadata; None if the file has none."""
    try:
        text = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        feature = json.loads(text).get("info", {}).get("features", {}).get(label, {})
        names = feature.get("names") or None
    except (ValueError, AttributeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None

"""Access to FFCV's loader: any list of sample ids, in its order, as decoded and cropped uint8 pixels.

FFCV contributes its file format, memory map, loader threads, compiled pipeline and JPEG decoder. Differences:

- The decoder is this package's own. FFCV's draws its crops from a global state and resizes by area. This one is given
  the crop of every sample id and resizes as Pillow does, so pixels depend on (seed, epoch, sample id) alone.
- It is compiled once per process, not once per file and output size.
- Parallel decoding is several of FFCV's iterators over one pipeline, not numba's parallel loops. Those compile for 20
  to 30 s, and one of numba's thread pools ends the process when two threads use it at once.
- Iterators are closed. FFCV's leaves its thread running when it is dropped, and hangs when its thread fails.
- FFCV sets torch's number of threads for the whole process whenever it touches a loader. Here it does not.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# FFCV is not installed everywhere; without it its types are unknown.

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from queue import Empty
from typing import Any

import numba.typed
import numpy as np
import torch
from numba import njit

from dist_prune.data.ffcv.pillow_resize import copy_raw, empty_image, resample_row
from dist_prune.errors import PruneError

_threads, _typed = torch.get_num_threads(), numba.typed.Dict
numba.typed.Dict = dict  # type: ignore[misc] # FFCV stores two words in one; compiling it takes 3 s in every process
try:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode
    from ffcv.loader import Loader, OrderOption
    from ffcv.loader import loader as loader_module
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.reader import Reader
    from ffcv.types import (
        ALLOC_TABLE_TYPE,
        CURRENT_VERSION,
        TYPE_ID_HANDLER,
        FieldDescType,
        HeaderType,
        get_metadata_type,
    )
finally:
    numba.typed.Dict = _typed  # type: ignore[misc]
    torch.set_num_threads(_threads)
Compiler.set_num_threads = lambda n: setattr(Compiler, "num_threads", max(1, n))  # type: ignore[method-assign]

RAW = int(IMAGE_MODES["raw"])
ENCODER = RGBImageField
CHUNK = 16  # images that one iterator decodes in one step
_decode_jpeg = njit(nogil=True)(imdecode)


@njit(nogil=True, fastmath=False)
def _decode(ids, file, items, windows, kind, vertical_first, pixels, status):
    """Decode, crop and resize images.

    Args:
        ids: (n,) int64 sample ids.
        file: (bytes,) uint8, the whole file.
        items: (N, 5) int64: byte offset, bytes, 1 if the pixels are raw, height, width.
        windows: (N, 9) int32, see ``pillow_resize.centre_windows``.
        kind: of interpolation, a value of ``pillow_resize.KINDS``.
        vertical_first: see ``pillow_resize.resample_window``.
        pixels: (n, size, size, 3) uint8, overwritten.
        status: (n, 1) int32, overwritten: 0 for a decoded image.
    """
    for i in range(len(ids)):
        place, length, raw, height, width = items[ids[i]]
        data = file[place : place + length]
        image = empty_image(height, width)
        if raw == 0:
            status[i, 0] = _decode_jpeg(data, image, height, width, height, width, 0, 0, 1, 1, False, False)
        else:
            status[i, 0] = copy_raw(data, image)
        if status[i, 0] == 0:
            resample_row(image, windows[ids[i]], kind, vertical_first, pixels[i])


def read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the index of a .beton.

    Args:
        path: the .beton.

    Returns:
        Items (n, 5) int64, see ``FfcvSource``, and labels (n,) int64.

    Raises:
        PruneError: the file is not from this version of ffcv, has other fields, or its index points outside the file.
    """
    try:
        reader = Reader(str(path))
        image, labels = reader.metadata["f0"], reader.metadata["f1"].astype(np.int64)
        sizes = np.zeros(len(labels), np.int64)
        sizes[reader.alloc_table["sample_id"].astype(np.int64)] = reader.alloc_table["size"]
    except (AssertionError, ValueError, IndexError, KeyError, OSError) as error:
        raise PruneError(f"{path} is not an FFCV file that this version of ffcv reads: {error}") from error
    if reader.field_names != ["image", "label"] or len(labels) != reader.num_samples:
        raise PruneError(f"{path} holds the fields {reader.field_names}, not image and label of every sample")
    columns = (image["data_ptr"], sizes, image["mode"] == RAW, image["height"], image["width"])
    items = np.stack([column.astype(np.int64) for column in columns], 1)
    if len(items) == 0 or (items[:, [1, 3, 4]] < 1).any() or (items[:, 0] + items[:, 1] > path.stat().st_size).any():
        raise PruneError(f"the index of {path} points outside the file; write it again")
    return items, labels


class _WindowDecoder(SimpleRGBImageDecoder):
    """The only operation of the pipeline: (n, size, size, 3) uint8 pixels and (n, 1) int32 status."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        shape, kind = (self.size, self.size, 3), np.dtype("<u1")
        queries = (AllocationQuery(shape, kind), AllocationQuery((1,), np.dtype("<i4")))
        return replace(previous_state, jit_mode=True, shape=shape, dtype=kind), queries

    def generate_code(self):
        def decode(ids, memory, tables, storage):
            pixels, status = memory
            items, windows, kind, vertical_first = tables
            _decode(ids, storage[0], items, windows, kind, vertical_first, pixels, status)
            return pixels, status

        return decode


class _ClosableIterator(EpochIterator):
    """One of FFCV's iterators (a thread) whose failure reaches the consumer and that can be stopped."""

    failure: BaseException | None = None

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # the consumer raises it; otherwise it would wait forever
            self.failure = error
            self.output_queue.put(None)

    def next_chunk(self) -> tuple[np.ndarray, np.ndarray]:
        try:
            return super().__next__()[0]
        except StopIteration:
            raise RuntimeError("FFCV's iterator ended early") from self.failure

    def stop(self) -> None:
        """Stop and join the thread. It may wait for space in its queue, so the queue is emptied."""
        self.iter_ixes = iter(())
        self.terminate_event.set()
        while self.is_alive():
            try:
                self.output_queue.get(timeout=0.02)
            except Empty:
                self.join(0.02)
        self.close()


class _LeanCacheManager(OSCacheManager):
    """FFCV's memory map without its dictionaries over all samples, which only its other manager reads.

    For ImageNet they take seconds and half a gigabyte.
    """

    def __init__(self, reader: Reader):
        self.reader, self.context = reader, OSCacheContext(self)
        self.ptrs = self.sizes = np.zeros(0, np.uint64)


@contextmanager
def _uncompiled_loaders() -> Iterator[None]:
    """Make FFCV create loaders that compile nothing (_decode is compiled once) and keep no dictionaries."""
    enabled, manager = Compiler.is_enabled, loader_module.OSCacheManager
    Compiler.set_enabled(False)
    loader_module.OSCacheManager = _LeanCacheManager  # type: ignore[misc]
    try:
        yield
    finally:
        Compiler.set_enabled(enabled)
        loader_module.OSCacheManager = manager  # type: ignore[misc]


class BetonDecoder:
    """Decoder of one .beton to one output size, for any number of epochs.

    Args:
        path: the .beton.
        size: side of the decoded squares in pixels.
    """

    def __init__(self, path: Path, size: int):
        pipelines: Any = {"image": [_WindowDecoder(size)], "label": None}
        with _uncompiled_loaders():
            self._loader = Loader(
                str(path),
                CHUNK,
                num_workers=1,
                os_cache=True,
                order=OrderOption.SEQUENTIAL,
                distributed=False,
                drop_last=False,
                pipelines=pipelines,
            )

    def chunks(
        self, ids: np.ndarray, tables: tuple[np.ndarray, np.ndarray, int, bool], workers: int, ahead: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Decode images.

        Args:
            ids: (n,) int64 sample ids, in the order wanted; repeats are allowed.
            tables: items, windows, kind and vertical_first, see ``_decode``.
            workers: number of threads.
            ahead: number of images that are decoded before they are asked for.

        Yields:
            (pixels (n, size, size, 3) uint8, status (n, 1) int32) of each ``CHUNK`` ids. Both are overwritten when the
            next chunk is asked for.
        """
        id_chunks = [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]
        count = min(max(1, workers), len(id_chunks))
        loader_view: Any = copy.copy(self._loader)  # iterators of other image loaders keep their tables
        loader_view.batches_ahead = min(max(2, -(-ahead // (CHUNK * max(1, count)))), 64)
        loader_view.reader = copy.copy(loader_view.reader)
        loader_view.reader.metadata = {"f0": tables}
        iterators: list[_ClosableIterator] = []
        try:
            for first in range(count):
                loader_view.indices = np.concatenate(id_chunks[first::count]).astype(np.int64)
                indices: Any = loader_view.indices  # an array is a sequence
                iterators.append(_ClosableIterator(loader_view, indices))
            for number in range(len(id_chunks)):
                yield iterators[number % count].next_chunk()
        finally:
            for iterator in iterators:
                iterator.stop()


@lru_cache(maxsize=8)
def shared_decoder(path: Path, identity: str, size: int) -> BetonDecoder:
    """The decoder of a file and an output size, shared by all backends of the file.

    Args:
        path: the .beton.
        identity: digest of its content.
        size: side of the decoded squares in pixels.
    """
    return BetonDecoder(path, size)


class BetonLayout:
    """Layout of a .beton (ffcv/types.py, ffcv/writer.py): header, fields, sample records, pages, allocation table."""

    VERSION = version("ffcv")
    MODES = {name: int(code) for name, code in IMAGE_MODES.items()}

    @staticmethod
    def _record_dtype() -> np.dtype:
        return get_metadata_type([RGBImageField(), IntField()])

    @staticmethod
    def data_start(count: int, page: int) -> int:
        """Offset of the first page in bytes.

        Args:
            count: number of samples.
            page: bytes of a page.
        """
        head = HeaderType.itemsize + 2 * FieldDescType.itemsize + count * BetonLayout._record_dtype().itemsize
        return -(-head // page) * page

    @staticmethod
    def encode_index(rows: np.ndarray, labels: np.ndarray, page: int) -> tuple[bytes, bytes, int]:
        """Encode everything but the pages.

        Args:
            rows: (n,) of ``encoder.ROW_DTYPE``.
            labels: (n,) int64 class numbers.
            page: bytes of a page.

        Returns:
            The bytes before the pages, the bytes after them, and the offset of the latter.
        """
        records = np.zeros(len(rows), BetonLayout._record_dtype())
        for name, column in (("mode", "mode"), ("height", "height"), ("width", "width"), ("data_ptr", "place")):
            records["f0"][name] = rows[column]
        records["f1"] = labels
        table = np.zeros(len(rows), ALLOC_TABLE_TYPE)
        table["sample_id"] = np.arange(len(rows))
        table["ptr"] = rows["place"]
        table["size"] = rows["size"]
        end = -(-int(rows[-1]["place"] + rows[-1]["size"]) // page) * page
        header = np.zeros(1, HeaderType)
        for name, value in (("version", CURRENT_VERSION), ("num_fields", 2), ("page_size", page)):
            header[name] = value
        header["num_samples"], header["alloc_table_ptr"] = len(rows), end
        fields = np.zeros(2, FieldDescType)
        kinds = {kind: number for number, kind in TYPE_ID_HANDLER.items()}
        for field, name, kind in zip(fields, ("image", "label"), (RGBImageField(), IntField()), strict=True):
            field["type_id"], field["arguments"] = kinds[type(kind)], kind.to_binary()[0]
            field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        return header.tobytes() + fields.tobytes() + records.tobytes(), table.tobytes(), end

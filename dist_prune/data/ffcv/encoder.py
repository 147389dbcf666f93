"""Encoding of images to the bytes of FFCV's image field, by worker processes, in the order of the sample ids."""

import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_prune.data.decoders import read_image
from dist_prune.data.ffcv.loader import ENCODER
from dist_prune.data.random_access import RandomAccessSource, fetch_pixels
from dist_prune.distributed.preemption import end_with_parent
from dist_prune.errors import PruneError

CHUNK = 64  # images that a worker encodes in one task
ROW_DTYPE = np.dtype([("mode", "<u1"), ("height", "<u2"), ("width", "<u2"), ("place", "<u8"), ("size", "<u8")])


@dataclass(frozen=True)
class Settings:
    """How images are stored.

    Attributes:
        max_resolution: longer sides are shrunk to this many pixels (by area, as FFCV does), 8 to 16384.
        quality: of JPEG, 1 to 100.
        write_mode: ``jpg``, ``raw`` (pixels unchanged), or ``proportion`` (about half of the images raw, drawn by
            sample id).

    Raises:
        PruneError: a value outside its range.
    """

    max_resolution: int = 256
    quality: int = 90
    write_mode: str = "jpg"

    def __post_init__(self):
        if not 8 <= self.max_resolution <= 16384:
            raise PruneError(f"--max-resolution: {self.max_resolution} pixels; 8 to 16384 are possible")
        if not 1 <= self.quality <= 100:
            raise PruneError(f"--quality: {self.quality}; JPEG quality is 1 to 100")

    @property
    def page(self) -> int:
        """Bytes of a page. No image crosses the end of one (FFCV's layout)."""
        page = 8 << 20
        while page < 3 * self.max_resolution**2:
            page *= 2
        return page


@dataclass(frozen=True)
class Encoded:
    """Encoded images of one chunk.

    Attributes:
        rows: (n,) of ``ROW_DTYPE``; ``place`` is still 0.
        payload: bytes of the images, one after another.
    """

    rows: np.ndarray
    payload: bytes


class Encoder:
    """Encodes images by sample id.

    Args:
        source: the opened split.
        settings: how images are stored.
    """

    def __init__(self, source: RandomAccessSource, settings: Settings):
        self.source = source
        self.field = ENCODER(settings.write_mode, settings.max_resolution, jpeg_quality=settings.quality)

    def __call__(self, ids: np.ndarray) -> Encoded:
        """Encode images.

        Args:
            ids: (n,) int64 sample ids.

        Raises:
            PruneError: an image cannot be decoded.
        """
        rows, payloads = np.zeros(len(ids), ROW_DTYPE), []

        def allocate(size: int) -> tuple[int, np.ndarray]:
            payloads.append(np.empty(size, np.uint8))
            return 0, payloads[-1]

        for row, sample in zip(rows, ids.tolist(), strict=True):
            metadata: Any = np.zeros(1, self.field.metadata_type)
            np.random.seed(sample % 2**32)  # 'proportion' draws from the global state of numpy
            self.field.encode(metadata, self._pixels(sample), allocate)
            row["mode"], row["height"], row["width"] = (metadata[name][0] for name in ("mode", "height", "width"))
            row["size"] = payloads[-1].nbytes
        return Encoded(rows, b"".join(payload.tobytes() for payload in payloads))

    def _pixels(self, sample: int) -> np.ndarray:
        """(H, W, 3) uint8 pixels; one channel is stored three times."""
        try:
            if self.source.fixed_size is None:
                return np.asarray(read_image(self.source.fetch(sample)))
            image = fetch_pixels(self.source, sample)
            return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
        except (ValueError, OSError) as error:
            raise PruneError(
                f"sample {sample}: the image {self.source.location(sample)} cannot be decoded: {error}. Replace or "
                "remove it and run the same command again"
            ) from error


def estimate_bytes(source: RandomAccessSource, settings: Settings) -> int:
    """Estimate the size of the file from up to 64 images spread over the data set.

    Args:
        source: the opened split.
        settings: how images are stored.

    Returns:
        Bytes.
    """
    count = len(source.labels)
    ids = np.unique(np.linspace(0, count - 1, min(count, 64)).astype(int))
    return int(Encoder(source, settings)(ids).rows["size"].mean() * count + 48 * count + settings.page)


_encoder: Encoder | None = None


def _init_worker(source: RandomAccessSource, settings: Settings) -> None:
    global _encoder
    end_with_parent()
    _encoder = Encoder(source, settings)


def _encode(ids: np.ndarray) -> Encoded:
    assert _encoder is not None
    return _encoder(ids)


def encode_chunks(source: RandomAccessSource, settings: Settings, first: int, workers: int) -> Iterator[Encoded]:
    """Encode images by worker processes.

    Args:
        source: the opened split.
        settings: how images are stored.
        first: the first sample id to encode.
        workers: number of processes; below 2, this process encodes.

    Yields:
        Chunks of at most ``CHUNK`` images, in the order of their ids.

    Raises:
        PruneError: an image cannot be decoded, or a process was killed.
    """
    chunks = deque(np.array_split(np.arange(first, len(source.labels)), -(-(len(source.labels) - first) // CHUNK) or 1))
    if workers < 2:
        yield from map(Encoder(source, settings), chunks)
        return
    context = multiprocessing.get_context("fork")  # fork shares arrays, it does not copy them
    with ProcessPoolExecutor(workers, context, _init_worker, (source, settings)) as pool:
        running: deque[Future[Encoded]] = deque()
        try:
            while chunks or running:
                while chunks and len(running) < 4 * workers:
                    running.append(pool.submit(_encode, chunks.popleft()))
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise PruneError(
                "an encoding process was killed (out of memory?): run the same command again; it resumes"
            ) from error
        finally:
            for future in running:
                future.cancel()

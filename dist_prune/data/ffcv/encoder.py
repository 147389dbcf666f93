"""Images as the bytes that FFCV's image field stores, by worker processes, in the order of their ids."""

import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_prune.data.ffcv.loader import ENCODER
from dist_prune.data.file_backend import read_image
from dist_prune.data.random_access import RandomAccessSource, fetch_pixels
from dist_prune.distributed.preemption import end_with_parent
from dist_prune.errors import PruneError

CHUNK = 64  # images that a worker encodes together
ROW = np.dtype([("mode", "<u1"), ("height", "<u2"), ("width", "<u2"), ("place", "<u8"), ("size", "<u8")])


@dataclass(frozen=True)
class Settings:
    """How images are stored.

    Attributes:
        max_resolution: longer sides are shrunk to this (by area, as FFCV does).
        quality: of JPEG, 1 to 100.
        write_mode: jpg, raw (pixels as they are), or proportion (every second image raw, by sample id).
    """

    max_resolution: int = 256
    quality: int = 90
    write_mode: str = "jpg"

    def __post_init__(self):
        if not 8 <= self.max_resolution <= 16384:
            raise PruneError(f"--max-resolution: {self.max_resolution} pixels; 8 to 16384 are possible")
        if not 1 <= self.quality <= 100:
            raise PruneError(f"--quality: {self.quality}; JPEG knows 1 to 100")

    @property
    def page(self) -> int:
        """Bytes of a page: no image crosses one (FFCV's layout)."""
        page = 8 << 20
        while page < 3 * self.max_resolution**2:
            page *= 2
        return page


@dataclass(frozen=True)
class Encoded:
    """Images of one chunk: rows (n,) of ROW without their place, and their bytes one after the other."""

    rows: np.ndarray
    payload: bytes


class Encoder:
    """Turns sample ids into what FFCV's image field stores."""

    def __init__(self, source: RandomAccessSource, settings: Settings):
        self.source = source
        self.field = ENCODER(settings.write_mode, settings.max_resolution, jpeg_quality=settings.quality)

    def __call__(self, ids: np.ndarray) -> Encoded:
        rows, parts = np.zeros(len(ids), ROW), []

        def allot(size: int) -> tuple[int, np.ndarray]:
            parts.append(np.empty(size, np.uint8))
            return 0, parts[-1]

        for row, sample in zip(rows, ids.tolist(), strict=True):
            about: Any = np.zeros(1, self.field.metadata_type)
            np.random.seed(sample % 2**32)  # 'proportion' draws from numpy's global state
            self.field.encode(about, self._pixels(sample), allot)
            row["mode"], row["height"], row["width"] = (about[name][0] for name in ("mode", "height", "width"))
            row["size"] = parts[-1].nbytes
        return Encoded(rows, b"".join(part.tobytes() for part in parts))

    def _pixels(self, sample: int) -> np.ndarray:
        """(H, W, 3) uint8; one channel is stored three times."""
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


def estimate(source: RandomAccessSource, settings: Settings) -> int:
    """Bytes that the file will have, from up to 64 images spread over the data set."""
    count = len(source.labels)
    some = np.unique(np.linspace(0, count - 1, min(count, 64)).astype(int))
    return int(Encoder(source, settings)(some).rows["size"].mean() * count + 48 * count + settings.page)


_encoder: Encoder | None = None


def _begin(source: RandomAccessSource, settings: Settings) -> None:
    global _encoder
    end_with_parent()
    _encoder = Encoder(source, settings)


def _encode(ids: np.ndarray) -> Encoded:
    assert _encoder is not None
    return _encoder(ids)


def encoded(source: RandomAccessSource, settings: Settings, first: int, workers: int) -> Iterator[Encoded]:
    """Chunks in order of their ids, encoded by processes; an error of a worker, or its death, is raised here."""
    chunks = deque(np.array_split(np.arange(first, len(source.labels)), -(-(len(source.labels) - first) // CHUNK) or 1))
    if workers < 2:
        yield from map(Encoder(source, settings), chunks)
        return
    context = multiprocessing.get_context("fork")  # arrays are shared, not copied
    with ProcessPoolExecutor(workers, context, _begin, (source, settings)) as pool:
        running: deque[Future[Encoded]] = deque()
        try:
            while chunks or running:
                while chunks and len(running) < 4 * workers:
                    running.append(pool.submit(_encode, chunks.popleft()))
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise PruneError(
                "an encoding process was killed (out of memory?): run the same command again, it goes on"
            ) from error
        finally:
            for future in running:
                future.cancel()

"""The FFCV backend: a .beton file with its sidecar as a source, and as a supplier of pixels."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_prune.data.augment import TRIES, WINDOW, shift_and_flip
from dist_prune.data.class_order import identity
from dist_prune.data.memory_backend import render
from dist_prune.data.sampling import uniform_from_ids
from dist_prune.data.transform_config import AugmentKey, TransformConfig
from dist_prune.errors import PruneError

FORMAT = 1  # of the sidecar
READ_WHOLE = 1 << 30  # files up to this size are digested when they are opened; larger ones only their index


@dataclass(frozen=True)
class FfcvSource:
    """One split in a .beton file.

    Attributes:
        items: (n, 5) int64: place, bytes, 1 where the pixels are raw, height, width.
        fixed_size: see ``ImageSource``.
        facts: the sidecar.
        numbering: see ``FolderSource``.
    """

    path: Path
    labels: np.ndarray
    classes: tuple[str, ...]
    in_chans: int
    items: np.ndarray = field(repr=False)
    fixed_size: tuple[int, int] | None
    facts: dict[str, Any] = field(repr=False)
    numbering: str = ""
    images, backends = None, ("ffcv",)

    @cached_property
    def lost(self) -> str:
        """In which form the file keeps pixels that are not those of its source; empty where they are.

        An image whose longer side is just ``max_resolution`` counts as shrunk: the file does not tell.
        """
        jpeg, shrunk = int((self.items[:, 2] == 0).sum()), int(self._shrunk.sum())
        said = [f"{jpeg:,} of {len(self.items):,} as JPEG of quality {self.facts['quality']}"] if jpeg else []
        return " and ".join(said + ([f"{shrunk:,} shrunk to {self.facts['max_resolution']} pixels"] if shrunk else []))

    @property
    def identity(self) -> str:
        """Of the images it was made from, where it keeps their pixels; else that, a colon and the file's digest."""
        found = identity(self.facts["source_digest"], self.numbering)
        return found + (f":{self.facts['sha256']}" if self.lost else "")

    def location(self, sample: int) -> str:
        return f"sample {sample} of {self.path}"

    def upsampled(self, side: int) -> int:
        """How many images were shrunk to less than the ``side`` that their shorter sides are resized to."""
        return int((self._shrunk & (self.items[:, 3:5].min(1) < side)).sum())

    @property
    def _shrunk(self) -> np.ndarray:
        """(n,) bool. FFCV cuts off the fraction of a pixel, so a longer side may be one less than was asked for."""
        return self.items[:, 3:5].max(1) >= self.facts["max_resolution"] - 1


def sidecar_of(path: Path) -> Path:
    """Where the sidecar of a .beton lies."""
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path) -> dict[str, Any]:
    """The sidecar of a .beton; PruneError where there is none or it does not fit."""
    place = sidecar_of(path)
    again = f"write it with: dist-prune make-ffcv --source ... --out {path}"
    if not path.is_file():
        raise PruneError(f"there is no {path}; {again}")
    if not place.is_file():
        raise PruneError(
            f"{path} has no sidecar {place.name}: its writing never ended, or another program wrote it; {again}"
        )
    try:
        facts = json.loads(place.read_text())
        found = facts["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise PruneError(f"{place} cannot be read: {error!r}; {again}") from error
    if found != FORMAT:
        raise PruneError(f"{place} has format {found}, this version reads {FORMAT}; {again}")
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise PruneError(
            f"{path} has {size:,} bytes, its sidecar says {facts['bytes']:,}: cut short or replaced; {again}"
        )
    return facts


def open_beton(path: Path) -> FfcvSource:
    """Open a .beton, checked against its sidecar.

    Raises:
        PruneError: ffcv cannot be used; no sidecar; a file that is cut short, changed, or not what the sidecar says.
    """
    facts, stream = read_sidecar(path), engine()
    small = facts["bytes"] <= READ_WHOLE
    if digest(path, *(() if small else facts["index"])) != facts["sha256" if small else "index_sha256"]:
        raise PruneError(
            f"{path} is not the file that {sidecar_of(path).name} describes (its digest differs); write it again"
        )
    items, labels = stream.read_index(path)
    classes = tuple(facts["classes"])
    if len(labels) != facts["count"] or not (labels.min() >= 0 and labels.max() < len(classes)):
        raise PruneError(
            f"{path} holds {len(labels)} images with labels {labels.min()} to {labels.max()}, its sidecar says "
            f"{facts['count']} images of {len(classes)} classes; write it again"
        )
    size = (int(items[0, 3]), int(items[0, 4])) if facts["arrays"] else None
    return FfcvSource(path, labels, classes, facts["in_chans"], items, size, facts)


def digest(path: Path, *parts: Sequence[int]) -> str:
    """sha256 of a file, or of its parts (start, end)."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for start, end in parts or ((0, path.stat().st_size),):
            file.seek(start)
            while start < end and (block := file.read(min(1 << 22, end - start))):
                found.update(block)
                start += len(block)
    return found.hexdigest()


@cache
def engine() -> ModuleType:
    """The module that talks to FFCV; PruneError that names what is missing."""
    try:
        from dist_prune.data.ffcv import loader
    except (ImportError, OSError) as error:
        raise PruneError(f"ffcv cannot be used here: {error}. `dist-prune doctor` says what is missing") from error
    return loader


class FfcvBackend:
    """Images of a ``FfcvSource``, decoded by FFCV.

    Pixels are those of the torch backend (image files) or of the memory backend (arrays), bit for bit, where the file
    keeps the images as they were: raw, and none larger than its ``max_resolution``.
    """

    name = "ffcv"
    allowed: tuple[str, ...] = ("none", "crop", "crop_flip", "resized_crop_flip")
    policies = False
    skips = False

    def __init__(self, source: FfcvSource, workers: int, pin: bool = False):
        self.source, self.workers, self.pin = source, workers, pin  # pin: page-locked memory, for GPUs

    def pixels(
        self, dealt: Sequence[np.ndarray], transform: TransformConfig, augment: AugmentKey | None, size: int
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """See ImageBackend."""
        ids = np.concatenate([np.zeros(0, np.int64), *dealt]).astype(np.int64)
        native = self.source.fixed_size  # arrays are decoded whole; the memory backend's transforms do the rest
        decoded = native[0] if native else size
        windows = np.zeros((len(self.source.items), 9), np.int32)  # memory of ids that are not asked for is not touched
        windows[ids] = self._windows(ids, transform, augment, size)
        ahead = 2 * max((len(part) for part in dealt), default=0)
        stream = engine().stream_of(self.source.path, self.source.facts["sha256"], decoded)
        chunks = stream.chunks(ids, self._tables(windows, transform), self.workers, ahead)
        try:
            for part, pixels in self._batches(dealt, chunks, decoded):
                images = pixels.permute(0, 3, 1, 2)[:, : self.source.in_chans]
                if native is not None:
                    images = render(images, part, transform, augment, size)
                elif augment is not None and transform.augment in ("crop", "crop_flip"):
                    images = shift_and_flip(images, augment, part, transform.augment == "crop_flip", transform.padding)
                yield part, images
        finally:
            chunks.close()

    def _windows(
        self, ids: np.ndarray, transform: TransformConfig, augment: AugmentKey | None, size: int
    ) -> np.ndarray:
        """(n, 9), see ``resample.centred``."""
        from dist_prune.data.ffcv import pillow_resize

        if transform.interpolation not in pillow_resize.KINDS or transform.crop_mode != "center" or not transform.exif:
            raise PruneError(
                f"data.backend: ffcv does interpolation {', '.join(pillow_resize.KINDS)}, crop mode center, upright "
                f"images; this recipe asks for {transform.interpolation}, {transform.crop_mode}, "
                f"exif={transform.exif}: write torch"
            )
        sides = self.source.items[ids, 3:5]
        if self.source.fixed_size is not None:
            return pillow_resize.centre_windows(sides, self.source.fixed_size[0], self.source.fixed_size[0])
        if augment is not None and transform.augment == "resized_crop_flip":
            chances = uniform_from_ids(*augment, ids, 2 * TRIES + 3, WINDOW).numpy()
            return pillow_resize.random_windows(sides, chances, transform.scale, transform.ratio, size)
        return pillow_resize.centre_windows(sides, size, math.floor(size / transform.crop))

    def _batches(
        self, dealt: Sequence[np.ndarray], chunks: Iterator[Any], size: int
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """FFCV's chunks put together to the lists that were asked for: (ids, (n, size, size, 3))."""
        pixels, status, used = np.zeros((0, size, size, 3), np.uint8), np.zeros((0, 1)), 0
        for part in dealt:
            out = torch.empty((len(part), size, size, 3), dtype=torch.uint8, pin_memory=self.pin)
            view, done = out.numpy(), 0
            while done < len(part):
                if used == len(pixels):
                    (pixels, status), used = next(chunks), 0
                take = min(len(part) - done, len(pixels) - used)
                bad = np.flatnonzero(status[used : used + take])
                if len(bad):
                    raise PruneError(f"sample {part[done + bad[0]]}: its image in {self.source.path} cannot be decoded")
                view[done : done + take] = pixels[used : used + take]
                done, used = done + take, used + take
            yield part, out

    def _tables(self, windows: np.ndarray, transform: TransformConfig) -> tuple[np.ndarray, np.ndarray, int, bool]:
        from dist_prune.data.ffcv import pillow_resize

        return self.source.items, windows, pillow_resize.KINDS[transform.interpolation], pillow_resize.VERTICAL_FIRST

    def close(self) -> None:
        """Nothing to let go of: FFCV's threads end with each iterator."""

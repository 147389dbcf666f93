"""The FFCV backend: a .beton file with its sidecar as an image source, and the pixels in it."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_prune.data.augment import TRIES, WINDOW, shift_and_flip
from dist_prune.data.class_order import renumbered_identity
from dist_prune.data.memory_backend import transform_batch
from dist_prune.data.sampling import uniform_from_ids
from dist_prune.data.source_forms import StoredFiles
from dist_prune.data.transform_config import AugmentKey, Size, TransformConfig
from dist_prune.errors import PruneError

FORMAT = 1  # of the sidecar
FULL_DIGEST_BYTES = 1 << 30  # of larger files only the index is digested when they are opened


@dataclass(frozen=True)
class FfcvSource:
    """One split in a .beton file.

    Attributes:
        path: the file.
        labels: (n,) int64 class numbers.
        classes: class names in the order of their numbers.
        in_chans: channels of an image.
        items: (n, 5) int64: byte offset, bytes, 1 if the pixels are raw, height, width.
        fixed_size: see ``ImageSource``.
        facts: content of the sidecar.
        numbering: see ``DecodedImages``.
        copy: a copy of the file that is read instead of it.
    """

    path: Path
    labels: np.ndarray
    classes: tuple[str, ...]
    in_chans: int
    items: np.ndarray = field(repr=False)
    fixed_size: tuple[int, int] | None
    facts: dict[str, Any] = field(repr=False)
    numbering: str = ""
    copy: Path | None = None
    images, backends = None, ("ffcv",)

    @cached_property
    def storage_loss(self) -> str:
        """Which images are not stored with the pixels of their source, in words; empty if all are.

        An image whose longer side equals ``max_resolution`` counts as shrunk: the file does not tell.
        """
        jpeg, shrunk = int((self.items[:, 2] == 0).sum()), int(self._shrunk.sum())
        losses = [f"{jpeg:,} of {len(self.items):,} as JPEG of quality {self.facts['quality']}"] if jpeg else []
        return " and ".join(
            losses + ([f"{shrunk:,} shrunk to {self.facts['max_resolution']} pixels"] if shrunk else [])
        )

    @property
    def identity(self) -> str:
        """Identity of the images it was made from; with a colon and the file's digest if their pixels are not kept."""
        digest = renumbered_identity(self.facts["source_digest"], self.numbering)
        return digest + (f":{self.facts['sha256']}" if self.storage_loss else "")

    def location(self, sample: int) -> str:
        """Where a sample is stored, for messages."""
        return f"sample {sample} of {self.path}"

    def stored_files(self) -> StoredFiles:
        """The .beton."""
        key = hashlib.sha256(f"{self.path.resolve()} {self.facts['sha256']}".encode(errors="surrogateescape"))
        return StoredFiles([self.path], [self.path.name], np.array([self.facts["bytes"]]), key.hexdigest())

    def read_from(self, folder: Path) -> "FfcvSource":
        """The same images, read from a copy of the file in ``folder``."""
        return replace(self, copy=folder / self.path.name)

    def count_upsampled(self, side: int) -> int:
        """Number of images that were shrunk and that a recipe resizes to larger sides again.

        Args:
            side: pixels to which the recipe resizes shorter sides.
        """
        return int((self._shrunk & (self.items[:, 3:5].min(1) < side)).sum())

    @property
    def _shrunk(self) -> np.ndarray:
        """(n,) bool. FFCV cuts off fractions of a pixel, so a longer side may be one less than ``max_resolution``."""
        return self.items[:, 3:5].max(1) >= self.facts["max_resolution"] - 1


def sidecar_path(path: Path) -> Path:
    """Path of the sidecar of a .beton."""
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path) -> dict[str, Any]:
    """Read the sidecar of a .beton.

    Args:
        path: the .beton.

    Raises:
        PruneError: the file or its sidecar is missing, the sidecar cannot be read or has another format, or the file
            has another size than the sidecar says.
    """
    sidecar = sidecar_path(path)
    remedy = f"write it with: dist-prune make-ffcv --source ... --out {path}"
    if not path.is_file():
        raise PruneError(f"there is no {path}; {remedy}")
    if not sidecar.is_file():
        raise PruneError(
            f"{path} has no sidecar {sidecar.name}: its writing was not finished, or another program wrote it; {remedy}"
        )
    try:
        facts = json.loads(sidecar.read_text())
        found_format = facts["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise PruneError(f"{sidecar} cannot be read: {error!r}; {remedy}") from error
    if found_format != FORMAT:
        raise PruneError(f"{sidecar} has format {found_format}, this version reads {FORMAT}; {remedy}")
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise PruneError(
            f"{path} has {size:,} bytes, its sidecar says {facts['bytes']:,}: cut short or replaced; {remedy}"
        )
    return facts


def open_beton(path: Path) -> FfcvSource:
    """Open a .beton and check it against its sidecar.

    Args:
        path: the .beton.

    Raises:
        PruneError: ffcv cannot be used, there is no sidecar, or the file is cut short, changed, or not the one that the
            sidecar describes.
    """
    facts, ffcv_loader = read_sidecar(path), import_loader()
    small = facts["bytes"] <= FULL_DIGEST_BYTES
    if digest(path, *(() if small else facts["index"])) != facts["sha256" if small else "index_sha256"]:
        raise PruneError(
            f"{path} is not the file that {sidecar_path(path).name} describes (its digest differs); write it again"
        )
    items, labels = ffcv_loader.read_index(path)
    classes = tuple(facts["classes"])
    if len(labels) != facts["count"] or not (labels.min() >= 0 and labels.max() < len(classes)):
        raise PruneError(
            f"{path} holds {len(labels)} images with labels {labels.min()} to {labels.max()}, its sidecar says "
            f"{facts['count']} images of {len(classes)} classes; write it again"
        )
    size = (int(items[0, 3]), int(items[0, 4])) if facts["arrays"] else None
    return FfcvSource(path, labels, classes, facts["in_chans"], items, size, facts)


def digest(path: Path, *ranges: Sequence[int]) -> str:
    """sha256 of a file in hex.

    Args:
        path: the file.
        ranges: (start, end) bytes to digest one after another; without any, the whole file.
    """
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        for start, end in ranges or ((0, path.stat().st_size),):
            file.seek(start)
            while start < end and (block := file.read(min(1 << 22, end - start))):
                sha256.update(block)
                start += len(block)
    return sha256.hexdigest()


@cache
def import_loader() -> ModuleType:
    """Import the module that calls FFCV.

    Raises:
        PruneError: ffcv cannot be imported; the message names what is missing.
    """
    try:
        from dist_prune.data.ffcv import loader
    except (ImportError, OSError) as error:
        raise PruneError(f"ffcv cannot be used here: {error}. `dist-prune doctor` says what is missing") from error
    return loader


class FfcvBackend:
    """Images of a ``FfcvSource``, decoded by FFCV.

    Pixels equal those of the torch backend (image files) or of the memory backend (arrays) bit for bit if the file
    keeps the images unchanged: raw, and none larger than its ``max_resolution``.

    Args:
        source: the opened .beton.
        workers: number of decoding threads.
        pin: return page-locked memory, for GPUs.
    """

    name = "ffcv"
    allowed: tuple[str, ...] = ("none", "crop", "crop_flip", "resized_crop_flip")
    policies = False
    skips = False

    def __init__(self, source: FfcvSource, workers: int, pin: bool = False):
        self.source = source
        self.workers = workers
        self.pin = pin

    def pixels(
        self, id_lists: Sequence[np.ndarray], transform: TransformConfig, augment: AugmentKey | None, size: Size
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Load pixels of one split by sample id. See ``ImageBackend.pixels``."""
        ids = np.concatenate([np.zeros(0, np.int64), *id_lists]).astype(np.int64)
        assert isinstance(size, int)  # the image loader refuses others
        fixed_size = self.source.fixed_size  # arrays are decoded whole and transformed as by the memory backend
        decoded_size = fixed_size[0] if fixed_size else size
        windows = np.zeros((len(self.source.items), 9), np.int32)  # pages of other ids are never touched
        windows[ids] = self._crop_windows(ids, transform, augment, size)
        ahead = 2 * max((len(batch_ids) for batch_ids in id_lists), default=0)
        decoder = import_loader().shared_decoder(
            self.source.copy or self.source.path, self.source.facts["sha256"], decoded_size
        )
        chunks = decoder.chunks(ids, self._decoder_tables(windows, transform), self.workers, ahead)
        try:
            for batch_ids, pixels in self._regroup(id_lists, chunks, decoded_size):
                images = pixels.permute(0, 3, 1, 2)[:, : self.source.in_chans]
                if fixed_size is not None:
                    images = transform_batch(images, batch_ids, transform, augment, size)
                elif augment is not None and transform.augment in ("crop", "crop_flip"):
                    images = shift_and_flip(
                        images, augment, batch_ids, transform.augment == "crop_flip", transform.padding
                    )
                yield batch_ids, images
        finally:
            chunks.close()

    def _crop_windows(
        self, ids: np.ndarray, transform: TransformConfig, augment: AugmentKey | None, size: int
    ) -> np.ndarray:
        """(n, 9) int32 windows of the images, see ``pillow_resize.centre_windows``."""
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
            uniforms = uniform_from_ids(*augment, ids, 2 * TRIES + 3, WINDOW).numpy()
            return pillow_resize.random_windows(sides, uniforms, transform.scale, transform.ratio, size)
        return pillow_resize.centre_windows(sides, size, math.floor(size / transform.crop))

    def _regroup(
        self, id_lists: Sequence[np.ndarray], chunks: Iterator[Any], size: int
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Regroup FFCV's chunks to the lists that were asked for: (ids, (n, size, size, 3) uint8)."""
        pixels = np.zeros((0, size, size, 3), np.uint8)
        status = np.zeros((0, 1))
        used = 0
        for ids in id_lists:
            out = torch.empty((len(ids), size, size, 3), dtype=torch.uint8, pin_memory=self.pin)
            view, done = out.numpy(), 0
            while done < len(ids):
                if used == len(pixels):
                    (pixels, status), used = next(chunks), 0
                take = min(len(ids) - done, len(pixels) - used)
                bad = np.flatnonzero(status[used : used + take])
                if len(bad):
                    raise PruneError(f"sample {ids[done + bad[0]]}: its image in {self.source.path} cannot be decoded")
                view[done : done + take] = pixels[used : used + take]
                done, used = done + take, used + take
            yield ids, out

    def _decoder_tables(
        self, windows: np.ndarray, transform: TransformConfig
    ) -> tuple[np.ndarray, np.ndarray, int, bool]:
        from dist_prune.data.ffcv import pillow_resize

        return self.source.items, windows, pillow_resize.KINDS[transform.interpolation], pillow_resize.VERTICAL_FIRST

    def close(self) -> None:
        """Do nothing: FFCV's threads end with each iterator."""

"""The torch backend: images decoded and transformed one by one in DataLoader workers, with timm's transforms."""

import atexit
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from dist_prune.data import augment as augmentation
from dist_prune.data.memory_backend import render
from dist_prune.data.random_access import RandomAccessSource, StoredImage, fetch_pixels
from dist_prune.data.timm_transforms import auto_augment_policy, eval_transform
from dist_prune.data.transform_config import AugmentKey, TransformConfig
from dist_prune.distributed.preemption import defer_signals_in_worker
from dist_prune.errors import PruneError

STUCK_S = 900  # a worker that delivers nothing for so long (a dead file system) ends the run instead of hanging it
ORIENTATION = 0x0112
_loaders: WeakSet[DataLoader[Any]] = WeakSet()  # those whose workers may still be there


def read_image(stored: StoredImage, exif: bool = True) -> Image.Image:
    """An image file, its bytes, or pixels (H, W, 3) uint8, as 8-bit RGB.

    Grayscale, palette, CMYK and alpha images are converted as Pillow does; 16-bit grayscale keeps its upper 8 bits;
    with ``exif`` a photograph is turned upright by its EXIF orientation.

    Raises:
        ValueError: the file is missing, damaged, or holds pixels without a meaning in 8 bits.
    """
    try:
        if isinstance(stored, np.ndarray):
            if stored.dtype != np.uint8 or stored.ndim != 3 or stored.shape[2] != 3:
                raise ValueError(f"it is {stored.dtype} {stored.shape}, not uint8 (height, width, 3)")
            return Image.fromarray(stored)
        if isinstance(stored, Path) and stored.exists() and not stored.is_file():  # a FIFO would be waited for
            raise ValueError("it is no file")
        with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored) as file:
            image: Image.Image = file
            if exif and "exif" in file.info and file.getexif().get(ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):
                return _sixteen(image)
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers, not 8 or 16 bits")
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            if image.mode == "RGB":  # a conversion would copy it once more
                image.load()
                return image
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError("it is not there any more") from error
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise ValueError(str(error) or repr(error)) from error


def _sixteen(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() >= 2**16:
        raise ValueError("its pixels have 32 bits, not 8 or 16")
    return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")


class _Request(NamedTuple):
    """What a worker is asked for."""

    ids: np.ndarray
    transform: TransformConfig
    augment: AugmentKey | None
    size: int


class _Part(NamedTuple):
    """What a worker sends for a list of ids."""

    ids: np.ndarray
    pixels: Tensor  # (n, size, size, C) uint8 from files, (n, C, size, size) from arrays
    failed: dict[int, str]


class FileBackend:
    """Images that workers fetch one by one, decode and transform.

    The workers are started with the first list and kept for the next epoch; ``close``, an error or an iterator that is
    dropped before its end sends them home.

    Args:
        workers: processes; 0 decodes in this one.
        on_error: ``fail`` at an image that cannot be read, ``skip`` leaves it out and notes it in ``skipped``.
        skipped: sample id -> why, filled in.
        pin: hand out page-locked memory (for GPUs).
    """

    name = "torch"
    allowed: tuple[str, ...] = ("none", "crop", "crop_flip", "resized_crop_flip")
    policies = True

    def __init__(self, source: RandomAccessSource, workers: int, on_error: str, skipped: dict[int, str], pin: bool):
        self.source, self.workers, self.on_error, self.skipped, self.pin = source, workers, on_error, skipped, pin
        self.skips = on_error == "skip" and source.images is None
        self._images = _Images(source, on_error == "skip")
        self._idle: DataLoader[Any] | None = None

    def pixels(
        self, dealt: Sequence[np.ndarray], transform: TransformConfig, augment: AugmentKey | None, size: int
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """See ImageBackend."""
        requests = [_Request(ids, transform, augment, size) for ids in dealt]
        loader = self._loader(requests) if self.workers and len(dealt) > 1 else None
        parts = iter(loader) if loader is not None else map(self._images.__getitems__, requests)
        files = self.source.fixed_size is None
        for number, wanted in enumerate(dealt):
            part = self._next(parts)
            self._note(part, training=augment is not None)
            if number + 1 == len(dealt):  # few ask for the end of an iterator when they have had its last batch
                self._idle = loader or self._idle
            yield (part.ids if part.failed else wanted), part.pixels.permute(0, 3, 1, 2) if files else part.pixels

    def close(self) -> None:
        """Send idle workers home."""
        self._idle = None

    def _loader(self, requests: list[_Request]) -> DataLoader[Any]:
        """The idle workers, or new ones (an epoch within an epoch has workers of its own), with their orders."""
        loader, self._idle = self._idle, None
        if loader is None:
            loader = DataLoader(
                self._images,
                batch_sampler=_Orders(),
                num_workers=self.workers,
                collate_fn=_as_it_is,
                worker_init_fn=defer_signals_in_worker,
                pin_memory=self.pin,
                timeout=STUCK_S,
                persistent_workers=True,
            )
            _loaders.add(loader)
        loader.batch_sampler.requests = requests  # type: ignore[union-attr]
        return loader

    def _next(self, parts: Iterator[_Part]) -> _Part:
        try:
            return next(parts)
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            raise PruneError(
                f"the loader's workers are gone or stuck: {error}. Too little memory (or /dev/shm) is the usual cause, "
                f"or a file system that does not answer; try fewer data.workers than {self.workers}"
            ) from error

    def _note(self, part: _Part, training: bool) -> None:
        for sample, reason in part.failed.items():
            if self.on_error == "fail":
                raise PruneError(
                    f"sample {sample}: the image {self.source.location(sample)} cannot be decoded: {reason}. Replace "
                    "or remove it, or write data.on_error=skip to leave such images out (the report lists them)."
                )
            self.skipped.setdefault(sample, reason)
        if training and part.failed and not len(part.ids):
            first = self.source.location(next(iter(part.failed)))
            raise PruneError(
                f"none of the {len(part.failed)} images of a training batch could be read, the first being {first}; "
                "data.on_error=skip is for single images, not for this"
            )


@atexit.register
def _dismiss() -> None:
    """Send all workers home before multiprocessing's own exit, whose SIGTERM they would sit out for their grace."""
    for loader in list(_loaders):
        iterator: Any = loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()


def _as_it_is(part: Any) -> Any:
    return part


class _Orders:
    """A batch sampler that hands out requests: workers get them whole, and outlive changes of look and epoch."""

    def __init__(self):
        self.requests: list[_Request] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


class _Images(Dataset[Any]):
    """Whole lists of images, rendered."""

    def __init__(self, source: RandomAccessSource, tolerant: bool):
        self.source, self.tolerant = source, tolerant

    def __getitems__(self, request: _Request) -> _Part:
        ids, transform, augment, size = request
        if self.source.images is not None:
            pixels = torch.from_numpy(self.source.images[ids]).permute(0, 3, 1, 2)
            return _Part(ids, render(pixels, ids, transform, augment, size), {})
        windows, numbers, whole = [[]] * len(ids), [0] * len(ids), self.source.fixed_size
        if augment is not None and transform.augment == "resized_crop_flip":
            windows = augmentation.window_uniforms(augment, ids)
        if augment is not None and transform.auto_augment:
            numbers = augmentation.numbers(augment, ids)
        shape = (*whole, self.source.in_chans) if whole else (size, size, 3)
        out, kept, failed = _shared((len(ids), *shape)), [], {}
        for sample, chance, number in zip(ids.tolist(), windows, numbers, strict=True):
            try:
                image = (
                    fetch_pixels(self.source, sample)
                    if whole
                    else read_image(self.source.fetch(sample), transform.exif)
                )
            except (ValueError, OSError) as error:
                failed[sample] = str(error)
                if not self.tolerant:
                    break
                continue
            if isinstance(image, np.ndarray):
                out.numpy()[len(kept)] = image
            else:
                out[len(kept)] = self._one(image, sample, chance, number, request).permute(1, 2, 0)
            kept.append(sample)
        ids, out = np.array(kept, dtype=np.int64), out[: len(kept)] if failed else out
        if whole and kept:
            out = render(out.permute(0, 3, 1, 2), ids, transform, augment, size)
        elif whole:
            out = torch.empty((0, self.source.in_chans, size, size), dtype=torch.uint8)
        return _Part(ids, out, failed)

    def _one(self, image: Image.Image, sample: int, chance: list[float], number: int, request: _Request) -> Tensor:
        """(3, size, size) uint8."""
        transform, augment, size = request.transform, request.augment, request.size
        if chance:
            box = augmentation.crop_window(image.height, image.width, chance, transform.scale, transform.ratio)
            mode = InterpolationMode(transform.interpolation)
            image = vision.resized_crop(image, *box, [size, size], mode)  # type: ignore[assignment,arg-type]
            image = ImageOps.mirror(image) if chance[-1] < 0.5 else image
            pixels = vision.pil_to_tensor(image)
        else:
            pixels = eval_transform(transform, size)(image)
            if augment is not None and transform.augment in ("crop", "crop_flip"):
                flip = transform.augment == "crop_flip"
                pixels = augmentation.shift_and_flip(
                    pixels[None], augment, np.array([sample]), flip, transform.padding
                )[0]
        if augment is None or not transform.auto_augment:
            return pixels
        return vision.pil_to_tensor(auto_augment_policy(transform, size)(vision.to_pil_image(pixels), number))


def _shared(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised uint8 tensor; in a worker in shared memory, so that sending it copies nothing."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]

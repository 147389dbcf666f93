"""The torch backend: DataLoader workers decode and transform image by image, with timm's transforms."""

import atexit
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
from dist_prune.data import tensor_resize
from dist_prune.data.decoders import Decoded, Divisor, decode, divisor_for
from dist_prune.data.mask_folder import mask_reader, read_mask
from dist_prune.data.memory_backend import transform_batch
from dist_prune.data.random_access import RandomAccessSource, fetch_pixels, target_kind
from dist_prune.data.timm_transforms import auto_augment_policy, eval_transform
from dist_prune.data.transform_config import AugmentKey, Size, TransformConfig, sides_of
from dist_prune.distributed.preemption import defer_signals_in_worker
from dist_prune.errors import PruneError

PIL_FILTERS = {
    InterpolationMode.NEAREST: Image.Resampling.NEAREST,
    InterpolationMode.BILINEAR: Image.Resampling.BILINEAR,
    InterpolationMode.BICUBIC: Image.Resampling.BICUBIC,
}
WORKER_TIMEOUT_S = 900  # then the run ends with an error: the file system of a worker may be dead
_loaders: WeakSet[DataLoader[Any]] = WeakSet()  # loaders whose workers may still run


class _Request(NamedTuple):
    """One batch that a worker has to load."""

    ids: np.ndarray
    transform: TransformConfig
    augment: AugmentKey | None
    size: Size


class _LoadedBatch(NamedTuple):
    """One batch from a worker: without the images in ``failed``."""

    ids: np.ndarray
    pixels: Tensor  # (n, H, W, C) uint8 from files, with a mask after the colours; (n, C, H, W) from arrays
    failed: dict[int, str]


class FileBackend:
    """Images that DataLoader workers fetch, decode and transform one by one.

    Workers start with the first call of ``pixels`` and stay for the next epoch. They end on ``close``, on an error, or
    when an iterator is dropped before its end.

    Args:
        source: the opened split.
        workers: number of processes; 0 decodes in this process.
        on_error: ``fail`` raises at an image that cannot be read, ``skip`` leaves it out.
        skipped: sample id -> reason; images that are left out are added here.
        pin: return page-locked memory, for GPUs.

    Attributes:
        name: see ``ImageBackend``.
        allowed: see ``ImageBackend``.
        policies: see ``ImageBackend``.
        skips: see ``ImageBackend``. False for arrays in memory.
    """

    name = "torch"
    allowed: tuple[str, ...] = ("none", "crop", "crop_flip", "resized_crop_flip")
    policies = True

    def __init__(self, source: RandomAccessSource, workers: int, on_error: str, skipped: dict[int, str], pin: bool):
        self.source = source
        self.workers = workers
        self.on_error = on_error
        self.skipped = skipped
        self.pin = pin
        self.skips = on_error == "skip" and source.images is None
        self._images = _ImageDataset(source, on_error == "skip")
        self._idle: DataLoader[Any] | None = None

    def pixels(
        self, id_lists: Sequence[np.ndarray], transform: TransformConfig, augment: AugmentKey | None, size: Size
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Load pixels of one split by sample id. See ``ImageBackend.pixels``."""
        requests = [_Request(request_ids, transform, augment, size) for request_ids in id_lists]
        loader = self._loader(requests) if self.workers and len(id_lists) > 1 else None
        batches = iter(loader) if loader is not None else map(self._images.__getitems__, requests)
        from_files = self.source.fixed_size is None
        for number, ids in enumerate(id_lists):
            batch = self._next_batch(batches)
            self._record_failures(batch, training=augment is not None)
            if number + 1 == len(id_lists):  # callers often drop an iterator after its last batch
                self._idle = loader or self._idle
            yield (batch.ids if batch.failed else ids), batch.pixels.permute(0, 3, 1, 2) if from_files else batch.pixels

    def close(self) -> None:
        """End idle workers."""
        self._idle = None

    def _loader(self, requests: list[_Request]) -> DataLoader[Any]:
        """The idle workers, or new ones, with their requests. An epoch within an epoch has workers of its own."""
        loader, self._idle = self._idle, None
        if loader is None:
            loader = DataLoader(
                self._images,
                batch_sampler=_RequestSampler(),
                num_workers=self.workers,
                collate_fn=_collate_nothing,
                worker_init_fn=defer_signals_in_worker,
                pin_memory=self.pin,
                timeout=WORKER_TIMEOUT_S,
                persistent_workers=True,
            )
            _loaders.add(loader)
        loader.batch_sampler.requests = requests  # type: ignore[union-attr]
        return loader

    def _next_batch(self, batches: Iterator[_LoadedBatch]) -> _LoadedBatch:
        try:
            return next(batches)
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            raise PruneError(
                f"the loader's workers are gone or stuck: {error}. Too little memory (or /dev/shm) is the usual cause, "
                f"or a file system that does not answer; try fewer data.workers than {self.workers}"
            ) from error

    def _record_failures(self, batch: _LoadedBatch, training: bool) -> None:
        for sample, reason in batch.failed.items():
            if self.on_error == "fail":
                raise PruneError(
                    f"sample {sample}: the image {self.source.location(sample)} cannot be decoded: {reason}. Replace "
                    "or remove it, or write data.on_error=skip to leave such images out (the report lists them)."
                )
            self.skipped.setdefault(sample, reason)
        if training and batch.failed and not len(batch.ids):
            first = self.source.location(next(iter(batch.failed)))
            raise PruneError(
                f"none of the {len(batch.failed)} images of a training batch could be read, the first being {first}; "
                "data.on_error=skip is for single images, not for this"
            )


@atexit.register
def _stop_workers() -> None:
    """Stop all workers before the exit handler of multiprocessing, whose SIGTERM they would outlive for a while."""
    for loader in list(_loaders):
        iterator: Any = loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()


def _collate_nothing(part: Any) -> Any:
    """Return a batch as it is."""
    return part


class _RequestSampler:
    """A batch sampler that yields whole requests, so workers outlive changes of transform and epoch."""

    def __init__(self):
        self.requests: list[_Request] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


class _ImageDataset(Dataset[Any]):
    """A data set whose items are whole transformed batches."""

    def __init__(self, source: RandomAccessSource, skip_unreadable: bool):
        self.source, self.tolerant = source, skip_unreadable

    def __getitems__(self, request: _Request) -> _LoadedBatch:
        ids, transform, augment, size = request
        if self.source.images is not None:
            pixels = torch.from_numpy(self.source.images[ids]).permute(0, 3, 1, 2)
            return _LoadedBatch(ids, self._transform_arrays(pixels, ids, request), {})
        uniforms = [[]] * len(ids)
        seeds = [0] * len(ids)
        fixed_size = self.source.fixed_size
        if augment is not None and transform.augment == "resized_crop_flip":
            uniforms = augmentation.window_uniforms(augment, ids)
        if augment is not None and transform.auto_augment:
            seeds = augmentation.policy_seeds(augment, ids)
        fetch_mask = mask_reader(self.source)
        upright = target_kind(self.source) not in ("masks", "boxes")  # which are in pixels of the image as it is stored
        sides = sides_of(size)
        shape = (*fixed_size, self.source.in_chans) if fixed_size else (*sides, 3 + (fetch_mask is not None))
        out = _empty_shared((len(ids), *shape))
        loaded = []
        failed = {}
        for sample, window_uniforms, seed in zip(ids.tolist(), uniforms, seeds, strict=True):
            try:
                if fixed_size:
                    out.numpy()[len(loaded)] = fetch_pixels(self.source, sample)
                else:
                    divisor = _divisor(window_uniforms, transform, size) if transform.dct_scaled else None
                    stored = self.source.fetch(sample)
                    image = decode(stored, transform.exif and upright, transform.decoder, divisor)
                    mask = _open_mask(fetch_mask(sample), image) if fetch_mask is not None else None
                    pixels = self._transform_one(image, mask, sample, window_uniforms, seed, request)
                    out[len(loaded)] = pixels.permute(1, 2, 0)
            except (ValueError, OSError) as error:
                failed[sample] = str(error)
                if not self.tolerant:
                    break
                continue
            loaded.append(sample)
        ids, out = np.array(loaded, dtype=np.int64), out[: len(loaded)] if failed else out
        if fixed_size and loaded:
            out = self._transform_arrays(out.permute(0, 3, 1, 2), ids, request)
        elif fixed_size:
            out = torch.empty((0, self.source.in_chans, *sides), dtype=torch.uint8)
        return _LoadedBatch(ids, out, failed)

    @staticmethod
    def _transform_arrays(pixels: Tensor, ids: np.ndarray, request: _Request) -> Tensor:
        """Transform (n, C, H, W) pixels of arrays; not if the image loader does it on the device."""
        if request.transform.is_deferred(request.augment):
            return pixels
        return transform_batch(pixels, ids, request.transform, request.augment, request.size)

    def _transform_one(
        self,
        decoded: Decoded,
        mask: Image.Image | None,
        sample: int,
        uniforms: list[float],
        seed: int,
        request: _Request,
    ) -> Tensor:
        """Transform one decoded image, and its mask in the same way: (3 or 4, height, width) uint8."""
        transform = request.transform
        augment = request.augment
        size, sides = request.size, list(sides_of(request.size))
        by_torch = transform.resizer == "torch"
        if uniforms and by_torch:
            box = augmentation.crop_window(decoded.height, decoded.width, uniforms, transform.scale, transform.ratio)
            top, left, height, width = box
            window = tensor_resize.as_pixels(decoded.image)[:, top : top + height, left : left + width]
            pixels = tensor_resize.resize(window, sides_of(size), transform.interpolation)
            pixels = pixels.flip(2) if uniforms[-1] < 0.5 else pixels
        elif uniforms:
            box = augmentation.crop_window(decoded.height, decoded.width, uniforms, transform.scale, transform.ratio)
            image = _resize_window(decoded, box, InterpolationMode(transform.interpolation), sides_of(size))
            image = ImageOps.mirror(image) if uniforms[-1] < 0.5 else image
            pixels = vision.pil_to_tensor(image)
            if mask is not None:
                mask = vision.resized_crop(mask, *box, sides, InterpolationMode.NEAREST)  # type: ignore[arg-type]
                mask = ImageOps.mirror(mask) if uniforms[-1] < 0.5 else mask  # type: ignore[arg-type]
                pixels = torch.cat([pixels, vision.pil_to_tensor(mask)])
        else:
            if by_torch:
                pixels = tensor_resize.eval_pixels(transform, size)(tensor_resize.as_pixels(decoded.image))
            else:
                pixels = torch.as_tensor(eval_transform(transform, size)(_as_image(decoded.image)))
            if mask is not None:
                # borders are void, which is stored as 0
                plain = replace(transform, interpolation="nearest", mean=(0.0,))
                resized = eval_transform(plain, size)(mask)
                pixels = torch.cat([pixels, torch.as_tensor(resized).reshape(1, *sides)])
            if (
                augment is not None
                and transform.augment in ("crop", "crop_flip")
                and not transform.is_deferred(augment)
            ):
                flip = transform.augment == "crop_flip"
                pixels = augmentation.shift_and_flip(
                    pixels[None], augment, np.array([sample]), flip, transform.padding
                )[0]
        if augment is None or not transform.auto_augment:
            return pixels
        return vision.pil_to_tensor(auto_augment_policy(transform, size)(vision.to_pil_image(pixels), seed))


def _as_image(pixels: Image.Image | np.ndarray) -> Image.Image:
    return Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels


def _divisor(uniforms: list[float], transform: TransformConfig, size: Size) -> Divisor:
    """By how much the sides of an image may be divided in decoding, so that its resize still makes it smaller."""
    side = max(sides_of(size))

    def divisor(height: int, width: int) -> int:
        if not uniforms:
            return divisor_for(math.floor(side / transform.crop), height, width)
        return divisor_for(
            side, *augmentation.crop_window(height, width, uniforms, transform.scale, transform.ratio)[2:]
        )

    return divisor


def _resize_window(
    decoded: Decoded, box: tuple[int, int, int, int], interpolation: InterpolationMode, sides: tuple[int, int]
) -> Image.Image:
    """Resize the window ``box`` (top, left, height, width in pixels of the stored image) to (height, width)."""
    top, left, height, width = box
    image = decoded.image
    if isinstance(image, np.ndarray):
        scaled = image.shape[:2] != (decoded.height, decoded.width)
    else:
        scaled = (image.height, image.width) != (decoded.height, decoded.width)
    if not scaled:
        if isinstance(image, np.ndarray):  # pixels beside the window need not become Pillow's
            window = Image.fromarray(image[top : top + height, left : left + width])
            return vision.resize(window, [*sides], interpolation)  # type: ignore[return-value,arg-type]
        return vision.resized_crop(image, *box, [*sides], interpolation)  # type: ignore[return-value,arg-type]
    image = _as_image(image)
    y, x = image.height / decoded.height, image.width / decoded.width
    fraction = (left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height))
    return image.resize((sides[1], sides[0]), PIL_FILTERS[interpolation], box=fraction)


def _open_mask(path: Path, image: Decoded) -> Image.Image:
    """A mask as its plane is stored: class numbers + 1, and 0 for void, which padding with zeros adds.

    Raises:
        ValueError: it cannot be read, or has another size than its image.
    """
    plane = Image.fromarray(read_mask(path) + np.uint8(1))
    if plane.size != (image.width, image.height):
        raise ValueError(f"its mask {path} is {plane.width}x{plane.height}, the image {image.width}x{image.height}")
    return plane


def _empty_shared(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised uint8 tensor. In a worker it lies in shared memory, so sending it copies nothing."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]

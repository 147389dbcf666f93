"""The image loader: from lists of sample ids to normalised batches on the device.

Backends deliver pixels. Transfer to the device, normalisation and random erasing are the same for all backends.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_prune.data.augment import erase, shift_and_flip
from dist_prune.data.box_transform import move_boxes
from dist_prune.data.decoders import check_decoder
from dist_prune.data.held_pixels import HeldPixels
from dist_prune.data.mask_folder import mask_reader
from dist_prune.data.memory_backend import transform_batch
from dist_prune.data.open_split import create_backend
from dist_prune.data.random_access import ImageSource, target_kind
from dist_prune.data.timm_transforms import check_policy
from dist_prune.data.transform_config import AugmentKey, ImageBackend, TransformConfig
from dist_prune.errors import PruneError

__all__ = ["Batch", "ImageLoader", "TransformConfig"]


@dataclass(frozen=True)
class Batch:
    """Images of one batch.

    Attributes:
        images: (n, C, H, W) normalised, of the loader's ``dtype``, on its device.
        labels: the targets, on its device: (n,) int64 class numbers; or what the task of the data set has: masks (n,
            H, W) int64, labels (n, classes) int64, values (n, outputs) float32, boxes (n, m, 6) float32: class from 0
            (-1: no box), x0, y0, x1, y1 in pixels of ``images``, and 1 for a crowd.
        ids: (n,) int64 sample ids, on the CPU.
        reference: the dense network's outputs on the images, where a task compares with them.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    reference: Any = None


@dataclass
class ImageLoader:
    """Loads batches of one split, in any order.

    It keeps no position. The caller's lists of ids decide which image comes when (see sampling.py), so a loop that was
    stopped in the middle of an epoch resumes exactly with the remaining lists.

    The pixels of an image depend on its id, the transform and (seed, epoch) alone, not on the batch, the number of
    workers or the rank.

    Attributes:
        source: the opened split.
        transform: sizes, normalisation, augmentation.
        device: where batches go.
        workers: decoding processes (``torch``; 0 decodes in this process) or threads (``ffcv``).
        dtype: of the images of a batch.
        memory_format: of the images of a batch.
        backend: ``torch``, ``ffcv`` or ``memory``; ``auto`` takes the first that the source names.
        on_error: ``fail`` raises at an image that cannot be read, ``skip`` leaves it out and records it in ``skipped``.
        skipped: sample id -> the reason, for the images that this rank has left out so far.
        exact: raise, even with ``skip``, if an image is missing from a batch without augmentation. Statistics are
            addressed by image, so scoring needs every one.

    Raises:
        PruneError: the backend cannot read the source, or cannot do the augmentation.
    """

    source: ImageSource
    transform: TransformConfig
    device: torch.device
    workers: int = 0
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.channels_last  # a fifth faster on CPUs with weights of either format
    backend: str = "auto"
    on_error: str = "fail"
    skipped: dict[int, str] = field(default_factory=dict)
    exact: bool = False
    _image_backend: ImageBackend = field(init=False, repr=False)
    _scale: tuple[Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self):
        self._image_backend = create_backend(
            self.source, self.backend, self.device, self.workers, self.on_error, self.skipped
        )
        self._check_backend()
        mean = torch.tensor(self.transform.mean, dtype=self.dtype, device=self.device)
        self._scale = (255 * mean, 255 * torch.tensor(self.transform.std, dtype=self.dtype, device=self.device))

    def __len__(self) -> int:
        """Number of images of the split."""
        return len(self.source.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image of a batch."""
        return self.source.in_chans, *self.transform.sides

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of an image's targets, without the batch; () for class numbers and masks."""
        return np.shape(getattr(self.source, "targets", self.source.labels))[1:]

    @property
    def skips(self) -> bool:
        """Whether images that cannot be read may be left out."""
        return self._image_backend.skips

    def batches(self, id_lists: Iterable[np.ndarray], augment: AugmentKey | None = None) -> Iterator[Batch]:
        """Load one batch for each list of ids.

        Args:
            id_lists: (n,) int64 sample ids of each batch.
            augment: (seed, epoch) for training images; None for the evaluation transform.

        Yields:
            The batches, in the order of the lists. With ``on_error="skip"`` a batch lacks the images that cannot be
            read.

        Raises:
            PruneError: an image cannot be read and may not be skipped; no image of a training batch can be read; the
                loader's workers died.
        """
        labels = torch.from_numpy(getattr(self.source, "targets", self.source.labels))
        masked = mask_reader(self.source) is not None
        sizes: np.ndarray | None = getattr(self.source, "sizes", None) if target_kind(self.source) == "boxes" else None
        lists = list(id_lists)
        size = self.transform.size_at(augment)
        loaded = self._image_backend.pixels(lists, self.transform, augment, size)
        for requested, (ids, pixels) in zip(lists, loaded, strict=True):
            if self.exact and augment is None and len(ids) != len(requested):
                missing = sorted(set(requested.tolist()) - set(ids.tolist()))
                raise PruneError(
                    f"sample {missing[0]} could be read when the images were checked, and cannot be read now: "
                    f"{self.skipped.get(missing[0], '')}. Run the same command again to do without it."
                )
            index = torch.from_numpy(np.ascontiguousarray(ids))
            if augment is not None and self.transform.is_deferred(augment):
                pixels = self._augment_on_device(pixels, ids, augment)
            targets = pixels[:, -1].to(self.device, non_blocking=True) if masked else None
            images = self._normalise(pixels[:, :-1] if masked else pixels)
            if augment is not None and self.transform.erasing:
                images = erase(images, augment, ids, self.transform)
            if targets is not None:
                yield Batch(images, (targets - 1).long(), index)  # void, stored as 0, becomes 255
            elif sizes is not None:
                assert isinstance(size, int)  # checked when the split was opened
                boxes = move_boxes(labels[index], sizes[index.numpy()], index.numpy(), self.transform, augment, size)
                yield Batch(images, boxes.to(self.device, non_blocking=True), index)
            else:
                yield Batch(images, labels[index].to(self.device, non_blocking=True), index)

    def holding(self) -> "ImageLoader":
        """A loader of the same images that reads each list of ids once and holds its pixels, without augmentation."""
        held = copy.copy(self)
        if self._image_backend.name != "memory":
            held._image_backend = HeldPixels(self._image_backend)
        return held

    def close(self) -> None:
        """Stop the idle workers. The next call of ``batches`` starts new ones."""
        self._image_backend.close()

    def _augment_on_device(self, pixels: Tensor, ids: np.ndarray, augment: AugmentKey) -> Tensor:
        """The augmentation, all but random erasing, of (n, C, H, W) uint8 pixels, as tensor operations."""
        moved, transform = pixels.to(self.device, non_blocking=True), self.transform
        if self.source.fixed_size is not None:
            return transform_batch(moved, ids, transform, augment, transform.size_at(augment))
        if transform.augment == "none" or not len(ids):  # files were resized when they were decoded
            return moved
        return shift_and_flip(moved, augment, ids, transform.augment == "crop_flip", transform.padding)

    def _normalise(self, pixels: Tensor) -> Tensor:
        """(n, C, H, W) on [0, 255] -> normalised, on the device."""
        images = pixels.to(self.device, non_blocking=True)
        n, channels, height, width = pixels.shape
        rows = images.to(self.dtype, memory_format=torch.channels_last, copy=True).permute(0, 2, 3, 1).flatten(2)
        mean, std = (value.repeat(width) for value in self._scale)
        rows.sub_(mean).div_(std)  # rows of width * channels numbers vectorise, three channels do not
        return rows.view(n, height, width, channels).permute(0, 3, 1, 2).contiguous(memory_format=self.memory_format)

    def _check_backend(self) -> None:
        """Raise a PruneError if the transform asks for something that the backend cannot do."""
        transform, backend = self.transform, self._image_backend
        if transform.augment not in backend.allowed:
            raise PruneError(
                f"data.augment: the {backend.name} backend cannot do {transform.augment!r}; "
                f"allowed: {', '.join(backend.allowed)}"
            )
        if not isinstance(transform.size, int) and backend.name == "ffcv":
            raise PruneError("data.image_size: the ffcv backend gives squares; write one side, or data.backend=torch")
        for key, usual in (("decoder", "pillow"), ("dct_scaled", False), ("resizer", "pillow")):
            if getattr(transform, key) != usual and backend.name != "torch":
                does = "resizes" if key == "resizer" else "decodes"
                raise PruneError(
                    f"data.{key}: the {backend.name} backend {does} by itself; write data.backend=torch, or leave the "
                    "key out"
                )
        if transform.decoder != "pillow":
            check_decoder(transform.decoder)
        if transform.augment_on == "device":
            self._check_device_augmentation()
        if transform.auto_augment is None:
            return
        kind = target_kind(self.source)
        if kind in ("masks", "boxes"):
            raise PruneError(
                f"data.auto_augment: policies turn and shear images without their {kind}; leave the key out. "
                f"data.augment moves {kind} with their images"
            )
        check_policy(transform.auto_augment)
        if not backend.policies:
            raise PruneError(
                f"data.auto_augment: the {backend.name} backend cannot run timm's policies, which work image by image "
                "in Pillow; write data.backend=torch, or leave the key out"
            )
        if self.source.in_chans not in (1, 3):
            raise PruneError(f"data.auto_augment: policies are for 1 or 3 channels, not {self.source.in_chans}")

    def _check_device_augmentation(self) -> None:
        """Raise a PruneError if the augmentation needs each image by itself."""
        transform, remedy = self.transform, "write data.augment_on=host"
        if self._image_backend.name == "ffcv":
            raise PruneError(
                f"data.augment_on: FFCV crops while it decodes, so 'device' is not for the ffcv backend; {remedy} or "
                "data.backend=torch"
            )
        if transform.auto_augment is not None:
            raise PruneError(
                f"data.augment_on: timm's policies (data.auto_augment) work image by image in Pillow; {remedy}"
            )
        if self.source.fixed_size is None and transform.augment == "resized_crop_flip":
            raise PruneError(
                "data.augment_on: a random resized crop of image files needs each file's own size, so it is made where "
                f"they are decoded; {remedy}, or data.augment=crop_flip, or images of one size in an .npz file"
            )

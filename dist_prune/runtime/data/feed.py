"""The one door to images: from lists of sample ids to batches on the device, with one tail behind every backend."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.runtime.data.augment import erased
from dist_prune.runtime.data.backends import supplier
from dist_prune.runtime.data.random_access import ImageSource
from dist_prune.runtime.data.supply import Look, Moment, Supplier
from dist_prune.runtime.data.transforms import check_policy

__all__ = ["Batch", "Feed", "Look"]


@dataclass(frozen=True)
class Batch:
    """``images`` (n, C, H, W) float, normalised; ``labels`` (n,); ``ids`` (n,) sample ids, on the CPU."""

    images: Tensor
    labels: Tensor
    ids: Tensor


@dataclass
class Feed:
    """Batches of one split, in any order asked for.

    A feed has no state: who sees what when is decided by the lists of ids (dealing.py), so a loop that was stopped in
    the middle of an epoch goes on exactly by asking for the lists that are left.

    Attributes:
        source: ids, labels, classes.
        look: sizes, normalisation, augmentation.
        device: where batches go.
        workers: decoding processes (torch backend).
        dtype, memory_format: of the images handed out.
        backend: ``torch``, ``ffcv`` or ``memory``; ``auto`` takes what the source is made for.
        on_error: ``fail`` at an image that cannot be read, or ``skip`` it and note it in ``skipped``.
        skipped: sample id -> why it was left out, of this rank so far.
        exact: even then, lists with the evaluation look have to be delivered whole (statistics are addressed by image).
    """

    source: ImageSource
    look: Look
    device: torch.device
    workers: int = 0
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.channels_last  # a fifth faster on CPUs, whatever the weights have
    backend: str = "auto"
    on_error: str = "fail"
    skipped: dict[int, str] = field(default_factory=dict)
    exact: bool = False
    _supplier: Supplier = field(init=False, repr=False)
    _scale: tuple[Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self):
        self._supplier = supplier(self.source, self.backend, self.device, self.workers, self.on_error, self.skipped)
        self._refuse()
        mean = torch.tensor(self.look.mean, dtype=self.dtype, device=self.device)
        self._scale = (255 * mean, 255 * torch.tensor(self.look.std, dtype=self.dtype, device=self.device))

    def __len__(self) -> int:
        return len(self.source.labels)

    @property
    def skips(self) -> bool:
        """Whether images that cannot be read may be left out."""
        return self._supplier.skips

    def batches(self, dealt: Iterable[np.ndarray], augment: Moment | None = None) -> Iterator[Batch]:
        """Batches for lists of ids, in their order.

        Args:
            dealt: the ids of each batch.
            augment: (seed, epoch) for training images; None for the evaluation look.
        """
        labels = torch.from_numpy(self.source.labels)
        lists = list(dealt)
        found = self._supplier.pixels(lists, self.look, augment, self.look.size_at(augment))
        for wanted, (ids, pixels) in zip(lists, found, strict=True):
            if self.exact and augment is None and len(ids) != len(wanted):
                gone = sorted(set(wanted.tolist()) - set(ids.tolist()))
                raise PruneError(
                    f"sample {gone[0]} could be read when the images were checked, and cannot be read now: "
                    f"{self.skipped.get(gone[0], '')}. Run the same command again to do without it."
                )
            index = torch.from_numpy(np.ascontiguousarray(ids))
            images = self._tail(pixels)
            if augment is not None and self.look.erasing:
                images = erased(images, augment, ids, self.look)
            yield Batch(images, labels[index].to(self.device, non_blocking=True), index)

    def close(self) -> None:
        """Send the workers home that wait for another epoch; they come back when they are needed."""
        self._supplier.close()

    def _tail(self, pixels: Tensor) -> Tensor:
        """(n, C, H, W) on [0, 255] -> normalised, on the device."""
        images = pixels.to(self.device, non_blocking=True)
        n, channels, height, width = pixels.shape
        lines = images.to(self.dtype, memory_format=torch.channels_last, copy=True).permute(0, 2, 3, 1).flatten(2)
        mean, std = (value.repeat(width) for value in self._scale)
        lines.sub_(mean).div_(std)  # rows of width * channels: they vectorise, three channels do not
        return lines.view(n, height, width, channels).permute(0, 3, 1, 2).contiguous(memory_format=self.memory_format)

    def _refuse(self) -> None:
        """PruneError where the look asks for what the backend cannot do."""
        look, able = self.look, self._supplier
        if look.augment not in able.allowed:
            raise PruneError(
                f"data.augment: {look.augment!r} is nothing that the {able.name} backend can do; "
                f"allowed: {', '.join(able.allowed)}"
            )
        if look.auto_augment is None:
            return
        check_policy(look.auto_augment)
        if not able.policies:
            raise PruneError(
                f"data.auto_augment: the {able.name} backend cannot run timm's policies, which work image by image in "
                "Pillow; write data.backend=torch, or leave the key out"
            )
        if self.source.in_chans not in (1, 3):
            raise PruneError(f"data.auto_augment: policies are for 1 or 3 channels, not {self.source.in_chans}")

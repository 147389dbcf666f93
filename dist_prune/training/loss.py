"""The training loss: that of the task, with mixup and cutmix, and distillation from the dense network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn

from dist_prune.config.training import Training
from dist_prune.data.loader import Batch
from dist_prune.tasks.base import Task, in_float
from dist_prune.tasks.classification import CLASSIFICATION
from dist_prune.tasks.outputs import map_tensors, named_tensors

Forward = Callable[[Tensor], Tensor]


@dataclass
class TrainingLoss:
    """The losses of the images of a batch, computed without collectives.

    Attributes:
        settings: ``label_smoothing``, ``mixup``, ``cutmix``, ``mix_prob``, ``distill`` and ``distill_temperature``.
        classes: number of classes.
        seed: seed of the mixing, with epoch and step; the same on every rank.
        teacher: the dense network for distillation, in evaluation mode, or None.
        amp: makes the autocast context of the precision for each forward pass.
        task: decides loss, distillation and hits.
    """

    settings: Training
    classes: int
    seed: int
    teacher: nn.Module | None
    amp: Callable[[], torch.autocast]
    task: Task = CLASSIFICATION

    def __post_init__(self):
        s = self.settings
        self._mixup = None
        self._hits: Tensor | None = None
        if s.mixup > 0 or s.cutmix > 0:
            self._mixup = Mixup(
                mixup_alpha=s.mixup, cutmix_alpha=s.cutmix, prob=s.mix_prob, label_smoothing=s.label_smoothing,
                num_classes=self.classes,
            )  # fmt: skip

    def __call__(self, forward: Forward, batch: Batch, epoch: int, step: int) -> Tensor:
        """Run the forward pass and compute the losses; the number of correct predictions is added to ``hits``.

        Args:
            forward: the network, wrapped for the ranks.
            batch: n images (n, C, H, W) and their targets.
            epoch: number of the epoch, from 0.
            step: number of the update within the epoch, from 0.

        Returns:
            (n,) losses, float32 (float64 for a float64 network).
        """
        s = self.settings
        images, target = batch.images, batch.labels
        if self._mixup is not None:
            images, target = self._mix(self._mixup, images, target, epoch, step)
        if s.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        batch = Batch(images, target, batch.ids)
        with self.amp():
            outputs = self.task.forward(forward, batch)
        outputs = in_float(outputs)
        self._count_hits(outputs, target)
        losses = self.task.training_loss(outputs, batch, s)
        if self.teacher is None or s.distill == 0:
            return losses
        return (1 - s.distill) * losses + s.distill * self._distillation_losses(self.teacher, batch, outputs)

    def hits(self) -> Tensor | None:
        """The number of correct predictions on this rank since the last call.

        Returns:
            () int64 on the device; None if the task counts none.
        """
        hits, self._hits = self._hits, None
        return hits

    @torch.no_grad()
    def _count_hits(self, outputs: Any, target: Tensor) -> None:
        hits = self.task.hits(outputs, target)  # stays on the device: no waiting
        if hits is not None:
            self._hits = hits if self._hits is None else self._hits + hits

    def _mix(self, mixup: Mixup, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Mixed images (n, C, H, W) and soft labels (n, classes); numpy's global random state is restored.

        timm's mixing needs an even batch: the last image of an odd one is mixed with itself.
        """
        before = np.random.get_state()
        np.random.seed((self.seed * 1_000_003 + epoch * 8_191 + step) % 2**32)
        try:
            n = len(images)
            order = torch.arange(n + n % 2, device=images.device).clamp(max=n - 1)
            mixed, target = mixup(images[order].clone(), labels[order])
            return mixed[:n], target[:n]
        finally:
            np.random.set_state(before)

    def _distillation_losses(self, teacher: nn.Module, batch: Batch, outputs: Any) -> Tensor:
        """(n,) distances of the outputs to those of the dense network."""
        kind = batch.images.device.type
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16) if kind != "cpu" else self.amp():
            targets = self.task.forward(teacher, batch)
        dtypes = {tensor.dtype for _, tensor in named_tensors(outputs, "") if tensor.is_floating_point()}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        targets = map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, targets)
        return self.task.distil(outputs, targets, self.settings.distill_temperature)

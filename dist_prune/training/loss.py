"""The training loss: cross-entropy with label smoothing, mixup and cutmix, and distillation from the dense network."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.config.training import Training
from dist_prune.data.loader import Batch
from dist_prune.training.evaluation import num_correct

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
    """

    settings: Training
    classes: int
    seed: int
    teacher: nn.Module | None
    amp: Callable[[], torch.autocast]

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
            batch: n images (n, C, H, W) and labels (n,).
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
        with self.amp():
            logits = forward(images)
        logits = logits.float() if logits.dtype != torch.float64 else logits
        self._count_hits(logits.detach(), target)
        if target.dim() == 2:  # mixed labels (n, classes), which the mixing has smoothed
            losses = -(target.to(logits.dtype) * functional.log_softmax(logits, 1)).sum(1)
        else:
            losses = functional.cross_entropy(logits, target, reduction="none", label_smoothing=s.label_smoothing)
        if self.teacher is None or s.distill == 0:
            return losses
        return (1 - s.distill) * losses + s.distill * self._distillation_losses(self.teacher, images, logits)

    def hits(self) -> Tensor:
        """The number of correct predictions on this rank since the last call; of a mixed image the main label counts.

        Returns:
            () int64 on the device.
        """
        hits, self._hits = self._hits, None
        assert hits is not None, "no batch has been seen"
        return hits

    def _count_hits(self, logits: Tensor, target: Tensor) -> None:
        labels = target if target.dim() == 1 else target.argmax(1)
        hits = num_correct(logits, labels)  # stays on the device: no waiting
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

    def _distillation_losses(self, teacher: nn.Module, images: Tensor, logits: Tensor) -> Tensor:
        """(n,) T^2 KL(teacher || student) at temperature T (Hinton et al. 2015)."""
        t = self.settings.distill_temperature
        kind = images.device.type
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16) if kind != "cpu" else self.amp():
            targets = teacher(images)
        targets = functional.log_softmax(targets.to(logits.dtype) / t, 1)
        student = functional.log_softmax(logits / t, 1)
        return t * t * (targets.exp() * (targets - student)).sum(1)

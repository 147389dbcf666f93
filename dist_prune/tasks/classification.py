"""Classification: one class number for each image; cross-entropy, top-1 and top-5."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dist_prune.tasks.base import Batch, Task, Training
from dist_prune.tasks.outputs import main_output, shape_text
from dist_prune.tasks.tallies import LOSS_UNIT, count_losses, mean_of_counted, num_correct


class Classification(Task):
    """The largest of the logits names the class."""

    name = "classification"
    targets = "classes"
    titles = {"top1": "top-1 %", "top5": "top-5 %"}
    primary = "top1"
    provides = frozenset({"class labels", "class logits"})
    mixes = True
    answer_names = ("predicted", "confidence")

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross-entropy, (n,)."""
        return functional.cross_entropy(_logits(outputs), batch.labels, reduction="none")

    def training_loss(self, outputs: Any, batch: Batch, settings: Training) -> Tensor:
        """Cross-entropy with label smoothing; labels (n, classes) are mixed ones, which the mixing has smoothed."""
        logits, target = _logits(outputs), batch.labels
        if target.dim() == 2:
            return -(target.to(logits.dtype) * functional.log_softmax(logits, 1)).sum(1)
        return functional.cross_entropy(logits, target, reduction="none", label_smoothing=settings.label_smoothing)

    def hits(self, outputs: Any, targets: Tensor) -> Tensor:
        """Images of which the largest logit is that of their label; of a mixed image the main label counts."""
        return num_correct(_logits(outputs), targets if targets.dim() == 1 else targets.argmax(1))

    def tally(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        logits = _logits(outputs)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
        losses = functional.cross_entropy(logits.double(), batch.labels, reduction="none")
        return {"hits": torch.stack([top[:, 0].sum(), top.sum()]), "loss": count_losses(losses)}

    def tally_shapes(self, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"hits": (2,), "loss": (2,)}

    def answers(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """``predicted``: the class of the largest logit. ``confidence``: its softmax, in units of 1 / LOSS_UNIT.

        An image with a logit that is not finite has the confidence 0.
        """
        logits = _logits(outputs)
        confidence = functional.softmax(logits.double(), 1).amax(1).nan_to_num(0.0)
        return {"predicted": logits.argmax(1), "confidence": (confidence * LOSS_UNIT).round().long()}

    def figures(self, tables: Mapping[str, Tensor], images: int) -> dict[str, float]:
        """``top1`` and ``top5`` in percent (the label is among the 5 largest logits, or all of fewer classes)."""
        top1, top5 = tables["hits"].tolist()
        return {
            "top1": 100 * top1 / images,
            "top5": 100 * top5 / images,
            "loss": mean_of_counted(tables["loss"], images),
        }

    def distil(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """T^2 KL(teacher || student) at temperature T (Hinton et al. 2015), (n,)."""
        targets = functional.log_softmax(_logits(teacher) / temperature, 1)
        student = functional.log_softmax(_logits(outputs) / temperature, 1)
        return temperature * temperature * (targets.exp() * (targets - student)).sum(1)

    def check_outputs(self, outputs: Any, count: int, images: Tensor) -> str:
        if isinstance(outputs, Tensor) and outputs.dim() == 2:
            return ""
        return (
            f"gives {shape_text(outputs)}, for two images; a classifier that is trained here gives one tensor, "
            "(images, classes), in both modes. Leave out the keys of backbone.kwargs that ask for features, maps or "
            "auxiliary heads, or name another task (task.name)"
        )


def _logits(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else main_output(outputs)


CLASSIFICATION = Classification()

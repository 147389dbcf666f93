"""Multi-label: every class is in an image or not; binary cross-entropy and mean average precision."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dist_prune.tasks.base import Batch, Task
from dist_prune.tasks.outputs import main_output, shape_text
from dist_prune.tasks.tallies import count_losses, mean_of_counted


class MultiLabel(Task):
    """The sigmoid of a logit is the probability that the image has the class."""

    name = "multilabel"
    targets = "labels"
    titles = {"map": "mAP %"}
    primary = "map"

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Binary cross-entropy, mean over the classes, (n,)."""
        logits = main_output(outputs)
        return functional.binary_cross_entropy_with_logits(
            logits, batch.labels.to(logits.dtype), reduction="none"
        ).mean(1)

    def tally(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        return {"loss": count_losses(self.loss(outputs, batch))}

    def tally_shapes(self, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"loss": (2,)}

    def rows(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Logits and labels of each image: an order over all images cannot be counted batch by batch."""
        return {"scores": main_output(outputs), "labels": batch.labels}

    def row_shapes(self, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"scores": (outputs,), "labels": (outputs,)}

    def figures(self, tables: Mapping[str, Tensor], images: int) -> dict[str, float]:
        """``map``: mean of the average precision in percent over the classes that some image has; ``loss``."""
        pairs = zip(tables["scores"].T, tables["labels"].T, strict=True)
        found = [average_precision(scores, labels) for scores, labels in pairs if bool((labels > 0).any())]
        mean = 100 * sum(found) / len(found) if found else float("nan")
        return {"map": mean, "loss": mean_of_counted(tables["loss"], images)}

    def distil(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """T^2 times the binary cross-entropy towards the teacher's probabilities at temperature T, (n,)."""
        logits, targets = main_output(outputs) / temperature, torch.sigmoid(main_output(teacher) / temperature)
        losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return temperature * temperature * losses.mean(1)

    def check_outputs(self, outputs: Any, count: int, images: Tensor) -> str:
        logits = main_output(outputs)
        if isinstance(logits, Tensor) and logits.shape == (len(images), count):
            return ""
        return f"gives {shape_text(outputs)}, for two images; multi-label needs logits (images, {count})"


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Sum over thresholds of (recall step) x precision; images of equal score share one threshold.

    Args:
        scores: (n,) of one class.
        labels: (n,) 1 where an image has the class, else 0; at least one is 1.
    """
    order = scores.argsort(descending=True, stable=True)
    ranked, hits = scores[order], labels[order].double().cumsum(0)
    last = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)])  # of each group of equal scores
    hits, seen = hits[last], torch.arange(1, len(ranked) + 1)[last]
    steps = torch.diff(hits, prepend=hits.new_zeros(1))
    return float((steps * hits / seen).sum() / hits[-1])

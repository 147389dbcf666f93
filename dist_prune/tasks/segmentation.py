"""Semantic segmentation: a class for each pixel; mean cross-entropy of an image's pixels, mIoU and pixel accuracy."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from dist_prune.errors import PruneError
from dist_prune.tasks.base import Batch, Picture, Task, TaskOptions
from dist_prune.tasks.colours import blend, class_colours
from dist_prune.tasks.outputs import auxiliary_output, main_output, shape_text
from dist_prune.tasks.tallies import count_losses, mean_of_counted

VOID = 255  # value of a mask's pixels that have no class


class Options(TaskOptions):
    """Options of segmentation.

    Attributes:
        aux_weight: weight of the loss of an auxiliary head.
    """

    aux_weight: float = Field(
        default=0.5, ge=0, le=100, description="weight of the loss of an auxiliary head (output aux)"
    )


class Segmentation(Task):
    """The largest of a pixel's logits names its class. Pixels of value 255 in the mask (void) do not count.

    The network gives one tensor (images, classes, h, w), or several outputs of which ``main_output`` is taken. Logits
    of another size than the mask are resized to it (bilinear).
    """

    name = "segmentation"
    Options = Options
    targets = "masks"
    titles = {"miou": "mIoU %", "pixel_accuracy": "pixel accuracy %"}
    primary = "miou"
    any_size = True
    kept_tables = ("confusion",)

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Mean cross-entropy over the pixels of each image that are not void, (n,); 0 for an image of void alone.

        If the network has an auxiliary head (output ``aux``), ``aux_weight`` times its loss is added. The figure
        ``loss`` is without it.
        """
        losses, auxiliary = _mean_over_pixels(_logits(outputs, batch.labels), batch.labels), auxiliary_output(outputs)
        if auxiliary is None or not self.options.aux_weight:
            return losses
        return losses + self.options.aux_weight * _mean_over_pixels(_resized(auxiliary, batch.labels), batch.labels)

    def tally(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """``confusion``: (classes, classes), pixels by class of the mask (rows) and predicted class (columns)."""
        logits = _logits(outputs, batch.labels)
        count, labels = logits.shape[1], batch.labels
        pairs = torch.where(labels == VOID, count * count, labels * count + logits.argmax(1)).flatten()
        table = torch.zeros(count * count + 1, dtype=torch.int64, device=pairs.device)  # void comes last
        confusion = table.scatter_add_(0, pairs, torch.ones_like(pairs))[:-1].view(count, count)  # no wait for a GPU
        return {"confusion": confusion, "loss": count_losses(_mean_over_pixels(logits, batch.labels))}

    def tally_shapes(self, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"confusion": (outputs, outputs), "loss": (2,)}

    def figures(self, tables: Mapping[str, Tensor], images: int) -> dict[str, float]:
        """Figures in percent, over the pixels that are not void.

        Returns:
            ``miou``: mean over classes of pixels / union of mask and prediction; classes that are in no mask and in no
            prediction are left out of the mean. ``pixel_accuracy``: share of right pixels. ``loss``: mean of the
            images' losses.
        """
        confusion = tables["confusion"]
        right, union = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        ratios = [100 * hit / either for hit, either in zip(right.tolist(), union.tolist(), strict=True) if either]
        pixels = int(confusion.sum())
        return {
            "miou": sum(ratios) / len(ratios) if ratios else float("nan"),
            "pixel_accuracy": 100 * int(right.sum()) / pixels if pixels else float("nan"),
            "loss": mean_of_counted(tables["loss"], images),
        }

    def distil(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Mean over all pixels of T^2 KL(teacher || student) at temperature T, (n,)."""
        student, dense = _whole(outputs), _whole(teacher)
        targets = functional.log_softmax(dense / temperature, 1)
        logits = functional.log_softmax(student / temperature, 1)
        return temperature * temperature * (targets.exp() * (targets - logits)).sum(1).mean((1, 2))

    def check_outputs(self, outputs: Any, count: int, images: Tensor) -> str:
        logits = main_output(outputs)
        if isinstance(logits, Tensor) and logits.dim() == 4 and logits.shape[:2] == (len(images), count):
            return ""
        return (
            f"gives {shape_text(outputs)}, for two images; segmentation needs logits (images, {count}, h, w), one map "
            "for each class, as one tensor, as the first of several, or as the output 'logits' or 'out'"
        )

    def pictures(self, batch: Batch, images: np.ndarray, outputs: Mapping[str, Any]) -> list[list[Picture]]:
        """For each image: the image, its mask, and the classes that each network predicts, laid over the image."""
        masks = batch.labels.cpu().numpy()
        found = {name: _logits(out, batch.labels).argmax(1).cpu().numpy() for name, out in outputs.items()}
        rows = []
        for number, image in enumerate(images):
            colours = class_colours(256)
            row = [
                Picture("image", image),
                Picture("mask", blend(image, colours[masks[number]], masks[number] != VOID)),
            ]
            row += [Picture(name, blend(image, colours[classes[number]])) for name, classes in found.items()]
            rows.append(row)
        return rows

    def legend(self, classes: Sequence[str]) -> list[tuple[str, str]]:
        """The colour of each class."""
        colours = ("#{:02x}{:02x}{:02x}".format(*row) for row in class_colours(len(classes)).tolist())
        return list(zip(classes, colours, strict=True))


def _whole(outputs: Any) -> Tensor:
    logits = main_output(outputs)
    assert isinstance(logits, Tensor)
    return logits


def _resized(logits: Tensor, masks: Tensor) -> Tensor:
    """Logits of the size of the masks."""
    if logits.shape[-2:] == masks.shape[-2:]:
        return logits
    return functional.interpolate(logits, masks.shape[-2:], mode="bilinear", align_corners=False)


def _logits(outputs: Any, masks: Tensor) -> Tensor:
    return _resized(_whole(outputs), masks)


def _mean_over_pixels(logits: Tensor, masks: Tensor) -> Tensor:
    """(n,) mean cross-entropy over the pixels that are not void."""
    try:
        losses = functional.cross_entropy(logits, masks, ignore_index=VOID, reduction="none")
    except IndexError as error:  # on the CPU; a GPU stops the process
        wrong = masks[(masks < 0) | ((masks >= logits.shape[1]) & (masks != VOID))]
        value = int(wrong[0]) if len(wrong) else "?"
        raise PruneError(
            f"a mask has the class {value}, and the network gives {logits.shape[1]} classes, 0 to "
            f"{logits.shape[1] - 1} ({VOID} is void)"
        ) from error
    return losses.sum((1, 2)) / (masks != VOID).sum((1, 2)).clamp(min=1)

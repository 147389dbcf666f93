"""Batches of a user's own loader with boxes, in the forms that torchvision's detectors take."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_prune.errors import PruneError

FORM = (
    "a batch is (images, targets): images a float tensor (n, C, H, W), or n tensors (C, H, W) of one size; targets n "
    "mappings with boxes (m, 4) in pixels x0, y0, x1, y1 and labels (m,) from 1, and perhaps iscrowd (m,); or a tensor "
    "(n, m, 6) of class from 0 (-1: no box), x0, y0, x1, y1 and crowd"
)


def boxes_of_batch(images: Any, targets: Any) -> tuple[Tensor, Tensor | None]:
    """The images and boxes of a batch, collated to tensors.

    Args:
        images: of the batch.
        targets: of the batch, or None.

    Returns:
        Images (n, C, H, W) float, and None or (n, m, 6) float32: class from 0, x0, y0, x1, y1, crowd; rows that an
        image does not need have class -1.

    Raises:
        PruneError: they have another form, or a box lies outside of its image.
    """
    if isinstance(images, list | tuple) and images and all(isinstance(image, Tensor) for image in images):
        if len({tuple(image.shape) for image in images}) != 1:
            raise PruneError(
                "the loader's images have several sizes; one network sees one size here: resize them, and their boxes, "
                "in the data set's transform"
            )
        images = torch.stack(list(images))
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        form = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise PruneError(f"the loader's images are {form}; {FORM}")
    if targets is None:
        return images, None
    if isinstance(targets, Tensor):
        table = targets.float()
    elif isinstance(targets, list | tuple):
        table = _collated(targets)
    else:
        raise PruneError(f"the loader's targets are a {type(targets).__name__}; {FORM}")
    if table.dim() != 3 or table.shape[2] != 6 or len(table) != len(images):
        raise PruneError(f"the loader's targets are {tuple(table.shape)} for {len(images)} images; {FORM}")
    _check_inside(table, images)
    return images, table


def equally_long(parts: Sequence[Tensor]) -> list[Tensor]:
    """Tables (n, m, 6) of boxes, filled up to the largest m with rows of class -1."""
    most = max(part.shape[1] for part in parts)
    filled = []
    for part in parts:
        table = part.new_zeros((len(part), most, 6))
        table[..., 0] = -1
        table[:, : part.shape[1]] = part
        filled.append(table)
    return filled


def _collated(targets: Sequence[Any]) -> Tensor:
    rows = []
    for target in targets:
        if not isinstance(target, Mapping) or not {"boxes", "labels"} <= target.keys():
            raise PruneError(f"a target of the loader is {_form(target)}; {FORM}")
        boxes, labels = torch.as_tensor(target["boxes"]).float().reshape(-1, 4), torch.as_tensor(target["labels"])
        crowd = torch.as_tensor(target.get("iscrowd", torch.zeros(len(boxes))))
        if labels.shape != (len(boxes),) or crowd.shape != (len(boxes),):
            raise PruneError(
                f"a target of the loader has {len(boxes)} boxes and labels of {tuple(labels.shape)}; {FORM}"
            )
        if len(labels) and int(labels.min()) < 1:
            raise PruneError(
                f"a target of the loader has the label {int(labels.min())}; labels of torchvision's detectors are "
                "counted from 1, and 0 is the background"
            )
        rows.append(torch.cat([labels[:, None].float() - 1, boxes, crowd[:, None].float()], 1)[None])
    return torch.cat(equally_long(rows))


def _check_inside(table: Tensor, images: Tensor) -> None:
    height, width = images.shape[-2:]
    real = table[table[..., 0] >= 0]
    limits = torch.tensor([width, height, width, height], device=table.device)
    wrong = (real[:, 1:5] < -1).any(1) | (real[:, 1:5] > limits + 1).any(1) | (real[:, 3:5] <= real[:, 1:3]).any(1)
    if bool(wrong.any()):
        box = ", ".join(f"{value:g}" for value in real[wrong][0, 1:5].tolist())
        raise PruneError(
            f"the loader has the box {box} (x0, y0, x1, y1) in an image of {width}x{height} pixels: it lies outside, "
            "or has no area"
        )


def _form(target: Any) -> str:
    return (
        f"a mapping of {', '.join(map(str, target))}" if isinstance(target, Mapping) else f"a {type(target).__name__}"
    )

"""Boxes that move with their images: the same crop, resize and flip, decided by the same random numbers.

The geometry of an image is one scale and one shift for each axis, and perhaps a mirror. It follows from the size of the
stored image, the transform and (seed, epoch, id) alone; pixels are not needed.
"""

import math

import numpy as np
import torch
from torch import Tensor

from dist_prune.data import augment as augmentation
from dist_prune.data.sampling import uniform_from_ids
from dist_prune.data.transform_config import AugmentKey, TransformConfig

VISIBLE = 0.25  # smallest share of a box's area that a crop leaves of it; boxes of which less is left are dropped
SMALLEST = 1.0  # pixels of the input, the shortest side of a box that a crop has cut


def move_boxes(
    targets: Tensor,
    sizes: np.ndarray,
    ids: np.ndarray,
    transform: TransformConfig,
    augment: AugmentKey | None,
    size: int,
) -> Tensor:
    """Targets of a batch in pixels of the network's input.

    Args:
        targets: (n, m, 6) float32: class (-1: no box), x0, y0, x1, y1 in pixels of the stored image, crowd.
        sizes: (n, 2) width and height of the stored images.
        ids: (n,) int64 sample ids.
        transform: of the images.
        augment: (seed, epoch) for training images; None for the evaluation transform.
        size: side of the input in pixels.

    Returns:
        (n, m, 6) float32. Boxes are cut at the edges of the input. Rows of boxes of which less than ``VISIBLE`` is left
        have class -1.
    """
    scales, shifts, offsets, mirrored = placements(sizes, ids, transform, augment, size)
    out = targets.clone()
    corners = targets[..., 1:5].double().view(*targets.shape[:2], 2, 2)
    placed = corners * scales[:, None, None] + shifts[:, None, None]
    cut = (placed.clamp(0, size) + offsets[:, None, None]).clamp(0, size)  # what is cut first is not moved back in
    before, after = placed[:, :, 1] - placed[:, :, 0], cut[:, :, 1] - cut[:, :, 0]
    share = after.prod(-1) / before.prod(-1).clamp(min=1e-9)
    whole = (cut == placed + offsets[:, None, None]).flatten(2).all(-1)
    flipped = torch.stack([size - cut[:, :, 1, 0], size - cut[:, :, 0, 0]], -1)
    cut[..., 0] = torch.where(mirrored[:, None, None], flipped, cut[..., 0])
    stays = whole | ((share >= VISIBLE) & (after >= SMALLEST).all(-1))
    out[..., 1:5] = cut.flatten(2).float()
    out[..., 0] = torch.where(stays, targets[..., 0], -1.0)
    out[out[..., 0] < 0] = torch.tensor([-1.0, 0, 0, 0, 0, 0])
    return out


def placements(
    sizes: np.ndarray, ids: np.ndarray, transform: TransformConfig, augment: AugmentKey | None, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where stored pixels come to lie in the network's input.

    Args:
        sizes: (n, 2) width and height of the stored images.
        ids: (n,) int64 sample ids.
        transform: of the images.
        augment: (seed, epoch) for training images; None for the evaluation transform.
        size: side of the input in pixels.

    Returns:
        Scales, shifts and offsets of x and y, (n, 2) float64: a point at x lies at x * scale + shift, is cut at the
        input's edge, and moves by the offset; and (n,) bool: whether the input is mirrored after that.
    """
    offsets = torch.zeros((len(ids), 2), dtype=torch.float64)
    mirrored = torch.zeros(len(ids), dtype=torch.bool)
    if augment is not None and transform.augment == "resized_crop_flip":
        uniforms = augmentation.window_uniforms(augment, ids)
        windows = [
            augmentation.crop_window(int(height), int(width), own, transform.scale, transform.ratio)
            for (width, height), own in zip(sizes, uniforms, strict=True)
        ]
        top, left, height, width = torch.tensor(windows, dtype=torch.float64).view(-1, 4).T
        scales = size / torch.stack([width, height], 1)
        return scales, -torch.stack([left, top], 1) * scales, offsets, torch.tensor([own[-1] < 0.5 for own in uniforms])
    pairs = [
        [_evaluation(int(side), int(other), transform, size) for side, other in (pair, pair[::-1])] for pair in sizes
    ]
    scales, shifts = torch.tensor(pairs, dtype=torch.float64).view(-1, 2, 2).unbind(-1)
    if augment is not None and transform.augment in ("crop", "crop_flip"):
        uniforms = uniform_from_ids(*augment, ids, 3, augmentation.SHIFT)
        pad = augmentation.padding_of(size, transform.padding)
        corners = (uniforms[:, :2] * (2 * pad + 1)).long()
        offsets = pad - corners.flip(1).double()  # they are drawn for rows, then for columns
        mirrored = (uniforms[:, 2] < 0.5) if transform.augment == "crop_flip" else mirrored
    return scales, shifts, offsets, mirrored


def _evaluation(side: int, other: int, transform: TransformConfig, size: int) -> tuple[float, float]:
    """Scale and shift along one axis by timm's evaluation transform.

    Args:
        side: of the stored image along the axis.
        other: the other side.
        transform: of the images.
        size: side of the input in pixels.
    """
    resized = math.floor(size / transform.crop)
    if transform.crop_mode == "squash":
        now = resized
    elif transform.crop_mode == "border":
        now = round(side / (max(side, other) / resized))
    else:  # the shorter side gets the size
        now = resized if side <= other else int(resized * side / other)
    if now < size:
        return now / side, float((size - now) // 2)
    return now / side, -float(round((now - size) / 2.0))

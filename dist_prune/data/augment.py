"""Augmentation of images, decided by (seed, epoch, sample id) alone.

Random numbers come from ``sampling.uniform_from_ids``, so an image is augmented alike by every backend, in every batch
and for every number of ranks.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dist_prune.data.sampling import uniform_from_ids
from dist_prune.data.transform_config import AugmentKey, Size, TransformConfig, sides_of

SHIFT, WINDOW, ERASE, COLOUR, POLICY = range(5)  # streams of ``uniform_from_ids``
TRIES = 10  # draws of a window or a rectangle until one fits
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # Zhong et al. 2017, with timm's limits


def shift_and_flip(
    pixels: Tensor, augment_key: AugmentKey, ids: np.ndarray, flip: bool, padding: int | None = None
) -> Tensor:
    """Pad a batch with zeros, crop each image at a random position, and mirror half of the images if asked.

    Args:
        pixels: (n, C, H, W), any dtype, on any device.
        augment_key: (seed, epoch).
        ids: (n,) int64 sample ids.
        flip: whether to mirror images with probability 1/2.
        padding: pixels on each side; None: an eighth of the height, at least 1.

    Returns:
        (n, C, H, W) of the same dtype, on the same device.
    """
    n, channels, height, width = pixels.shape
    device, pad = pixels.device, padding_of(height, padding)
    uniforms = uniform_from_ids(*augment_key, ids, 3, SHIFT).to(device, non_blocking=True)
    offsets = (uniforms[:, :2] * (2 * pad + 1)).long()
    rows = offsets[:, :1] + torch.arange(height, device=device)
    columns = offsets[:, 1:] + torch.arange(width, device=device)
    columns = torch.where(uniforms[:, 2:] < 0.5, columns.flip(1), columns) if flip else columns
    padded = functional.pad(pixels, (pad,) * 4).permute(0, 2, 3, 1)
    padded_row = torch.arange(n, device=device)[:, None] * padded.shape[1] + rows
    pixel_index = padded_row[:, :, None] * padded.shape[2] + columns[:, None, :]
    # One gather of whole pixels from a table is four times as fast as indexing by image, row and column.
    gathered = padded.reshape(-1, channels).index_select(0, pixel_index.view(-1))
    return gathered.view(n, height, width, channels).permute(0, 3, 1, 2)


def padding_of(side: int, padding: int | None) -> int:
    """Pixels by which images are padded before a random crop; without a number an eighth of the side, at least 1."""
    return max(1, side // 8) if padding is None else padding


def window_uniforms(augment_key: AugmentKey, ids: np.ndarray) -> list[list[float]]:
    """Random numbers for ``crop_window``.

    Args:
        augment_key: (seed, epoch).
        ids: (n,) int64 sample ids.

    Returns:
        For each image 2 ``TRIES`` + 3 numbers, uniform in [0, 1): area and aspect ratio of each attempt, then top and
        left. The last number mirrors the image if it is below 1/2.
    """
    return uniform_from_ids(*augment_key, ids, 2 * TRIES + 3, WINDOW).tolist()


def crop_window(
    height: int, width: int, uniforms: Sequence[float], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Choose the window of a random resized crop (Szegedy et al. 2015).

    After ``TRIES`` attempts that do not fit, the largest central window of an allowed aspect ratio is taken, as in
    torchvision's RandomResizedCrop.

    Args:
        height: of the image in pixels.
        width: of the image in pixels.
        uniforms: random numbers of the image, see ``window_uniforms``.
        scale: (lowest, highest) fraction of the area.
        ratio: (lowest, highest) aspect ratio width / height, drawn log-uniformly.

    Returns:
        (top, left, height, width) of the window in pixels.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(TRIES):
        area = height * width * (scale[0] + uniforms[attempt] * (scale[1] - scale[0]))
        aspect = math.exp(low + uniforms[TRIES + attempt] * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(uniforms[2 * TRIES] * (height - h + 1)), int(uniforms[2 * TRIES + 1] * (width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def resize_windows(
    pixels: Tensor, augment_key: AugmentKey, ids: np.ndarray, transform: TransformConfig, size: Size
) -> Tensor:
    """Crop a random window of each image and resize it to one size with a triangle filter (as Pillow's bilinear).

    The filter is linear and separable, so a batch takes two batched matrix products.

    Args:
        pixels: (n, C, H, W) uint8, on any device.
        augment_key: (seed, epoch).
        ids: (n,) int64 sample ids.
        transform: gives ``scale`` and ``ratio`` of the windows.
        size: side of the result in pixels, or (height, width).

    Returns:
        (n, C, height, width) uint8. Half of the images are mirrored.
    """
    height, width = pixels.shape[-2:]
    uniforms = window_uniforms(augment_key, ids)
    boxes = np.array(
        [crop_window(height, width, image_uniforms, transform.scale, transform.ratio) for image_uniforms in uniforms]
    )
    top, left, h, w = torch.from_numpy(boxes.reshape(-1, 4)).to(pixels.device, non_blocking=True).T
    mirrored = torch.tensor([image_uniforms[-1] < 0.5 for image_uniforms in uniforms]).to(
        pixels.device, non_blocking=True
    )
    high, wide = sides_of(size)
    vertical, horizontal = _triangle_filter(top, h, height, high), _triangle_filter(left, w, width, wide)
    horizontal = torch.where(mirrored[:, None, None], horizontal.flip(1), horizontal)
    resized = vertical[:, None] @ pixels.float() @ horizontal[:, None].transpose(-1, -2)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _triangle_filter(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """(n, size, side) weights that resize ``length`` pixels from ``start`` to ``size`` pixels; each row sums to 1."""
    start, length = start[:, None, None].float(), length[:, None, None].float()
    step = length / size
    centre = start + (torch.arange(size, device=start.device)[None, :, None] + 0.5) * step
    position = torch.arange(side, device=start.device)[None, None, :] + 0.5
    weight = (1 - (position - centre).abs() / step.clamp(min=1)).clamp(min=0)
    weight = weight * ((position > start) & (position < start + length))
    return weight / weight.sum(2, keepdim=True)


def erase(images: Tensor, augment_key: AugmentKey, ids: np.ndarray, transform: TransformConfig) -> Tensor:
    """Apply random erasing (Zhong et al. 2017) in place.

    An image is chosen with probability ``transform.erasing``. A rectangle of 2 to 33 % of its area becomes zero (mode
    ``const``), one normally distributed colour (``rand``) or normally distributed noise (``pixel``). Random numbers are
    drawn on the CPU, so they are the same for every device.

    Args:
        images: (n, C, H, W) normalised images, on any device; overwritten.
        augment_key: (seed, epoch).
        ids: (n,) int64 sample ids.
        transform: gives ``erasing`` and ``erasing_mode``.

    Returns:
        ``images``.
    """
    n, _, height, width = images.shape
    uniforms = uniform_from_ids(*augment_key, ids, 2 * TRIES + 4, ERASE).numpy()
    low, high = (math.log(aspect) for aspect in ERASED_ASPECT)
    area = height * width * (ERASED_AREA[0] + uniforms[:, :TRIES] * (ERASED_AREA[1] - ERASED_AREA[0]))
    aspect = np.exp(low + uniforms[:, TRIES : 2 * TRIES] * (high - low))
    h, w = np.sqrt(area * aspect).round().astype(int), np.sqrt(area / aspect).round().astype(int)
    fits = (h > 0) & (h < height) & (w > 0) & (w < width)
    first_fit = fits.argmax(1)
    h, w = h[np.arange(n), first_fit], w[np.arange(n), first_fit]
    top = (uniforms[:, -3] * (height - h + 1)).astype(int)
    left = (uniforms[:, -2] * (width - w + 1)).astype(int)
    rows = np.flatnonzero((uniforms[:, -1] < transform.erasing) & fits.any(1))
    boxes = np.stack([top, left, h, w], 1)[rows]
    generators = [
        # on the CPU: every device has another generator
        torch.Generator().manual_seed(int(uniforms[row, -4] * 2**53))
        for row in rows.tolist()
    ]
    if images.device.type == "cpu":
        _erase_one_by_one(images, rows, boxes, generators, transform.erasing_mode)
    elif len(rows):
        _erase_at_once(images, rows, boxes, generators, transform.erasing_mode)
    return images


def _erase_one_by_one(
    images: Tensor, rows: np.ndarray, boxes: np.ndarray, generators: Sequence[torch.Generator], mode: str
) -> None:
    """Erase the rectangle (top, left, height, width) of each of the images ``rows``; in place."""
    for row, (top, left, h, w), generator in zip(rows.tolist(), boxes.tolist(), generators, strict=True):
        rectangle = images[row, :, top : top + h, left : left + w]
        if mode == "const":
            rectangle.zero_()
            continue
        shape = rectangle.shape if mode == "pixel" else (images.shape[1], 1, 1)
        rectangle.copy_(torch.randn(shape, generator=generator).expand_as(rectangle))


def _erase_at_once(
    images: Tensor, rows: np.ndarray, boxes: np.ndarray, generators: Sequence[torch.Generator], mode: str
) -> None:
    """The same by a few operations on the whole batch: a device waits for each of them."""
    n, channels, height, width = images.shape
    edges = np.zeros((n, 4), dtype=np.int64)  # without a rectangle: none of the rows and columns
    edges[rows] = boxes
    top, left, h, w = torch.from_numpy(edges).to(images.device, non_blocking=True)[:, :, None].unbind(1)
    vertical, horizontal = (torch.arange(side, device=images.device) for side in (height, width))
    inside = ((vertical >= top) & (vertical < top + h))[:, None, :, None]
    inside = inside & ((horizontal >= left) & (horizontal < left + w))[:, None, None, :]
    if mode == "const":
        images.masked_fill_(inside, 0)
        return
    if mode == "rand":
        colours = torch.zeros(n, channels, 1, 1)
        colours[rows] = torch.stack([torch.randn(channels, 1, 1, generator=generator) for generator in generators])
        images.copy_(torch.where(inside, colours.to(images.device, images.dtype, non_blocking=True), images))
        return
    noise = [
        torch.randn(channels, h, w, generator=generator).flatten()
        for (h, w), generator in zip(boxes[:, 2:].tolist(), generators, strict=True)
    ]
    filled = images.contiguous()  # the order of the noise is that of the axes
    filled.masked_scatter_(inside, torch.cat(noise).to(images.device, images.dtype, non_blocking=True))
    images.copy_(filled)


def policy_seeds(augment_key: AugmentKey, ids: np.ndarray) -> list[int]:
    """Seeds of an auto-augment policy.

    Args:
        augment_key: (seed, epoch).
        ids: (n,) int64 sample ids.

    Returns:
        n integers of 53 bits, one for each image.
    """
    return (uniform_from_ids(*augment_key, ids, 1, POLICY)[:, 0] * 2**53).long().tolist()

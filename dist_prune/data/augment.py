"""Augmentation from (seed, epoch, sample id) alone: the same for every backend, batch and number of ranks."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dist_prune.data.sampling import uniform_from_ids
from dist_prune.data.transform_config import AugmentKey, TransformConfig

SHIFT, WINDOW, ERASE, COLOUR, POLICY = range(5)  # streams of random numbers
TRIES = 10  # windows and rectangles that do not fit are drawn again so often
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # Zhong et al. 2017, as timm has them


def shift_and_flip(
    pixels: Tensor, augment_key: AugmentKey, ids: np.ndarray, flip: bool, padding: int | None = None
) -> Tensor:
    """Pad (by an eighth of the side: 4 for 32), crop at a place drawn per image, mirror every second one if asked.

    Args:
        pixels: (n, C, H, W).
        ids: (n,) sample ids.
    """
    n, channels, height, width = pixels.shape
    device, pad = pixels.device, max(1, height // 8) if padding is None else padding
    chance = uniform_from_ids(*augment_key, ids, 3, SHIFT).to(device, non_blocking=True)
    places = (chance[:, :2] * (2 * pad + 1)).long()
    rows = places[:, :1] + torch.arange(height, device=device)
    columns = places[:, 1:] + torch.arange(width, device=device)
    columns = torch.where(chance[:, 2:] < 0.5, columns.flip(1), columns) if flip else columns
    padded = functional.pad(pixels, (pad,) * 4).permute(0, 2, 3, 1)
    line = torch.arange(n, device=device)[:, None] * padded.shape[1] + rows
    place = line[:, :, None] * padded.shape[2] + columns[:, None, :]
    # pixels as rows of one table: a single gather of whole pixels, four times as fast as indexing image, row, column
    found = padded.reshape(-1, channels).index_select(0, place.view(-1))
    return found.view(n, height, width, channels).permute(0, 3, 1, 2)


def window_uniforms(augment_key: AugmentKey, ids: np.ndarray) -> list[list[float]]:
    """For each image the numbers that ``window`` needs, and a last one that mirrors it where it is below a half."""
    return uniform_from_ids(*augment_key, ids, 2 * TRIES + 3, WINDOW).tolist()


def crop_window(
    height: int, width: int, chance: Sequence[float], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A window (top, left, height, width) of a share ``scale`` of the area and an aspect ``ratio`` (log-uniform).

    Windows that do not fit are drawn again ten times; then the largest central one of an allowed aspect is taken (as
    torchvision's RandomResizedCrop does).
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for number in range(TRIES):
        area = height * width * (scale[0] + chance[number] * (scale[1] - scale[0]))
        aspect = math.exp(low + chance[TRIES + number] * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(chance[2 * TRIES] * (height - h + 1)), int(chance[2 * TRIES + 1] * (width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_windows(
    pixels: Tensor, augment_key: AugmentKey, ids: np.ndarray, transform: TransformConfig, size: int
) -> Tensor:
    """Drawn windows of a batch, resized to (size, size) with a triangle filter over the pixels (as Pillow's bilinear).

    The filter is linear and separable, so a batch is two batched matrix products. (n, C, H, W) -> uint8.
    """
    height, width = pixels.shape[-2:]
    chances = window_uniforms(augment_key, ids)
    boxes = np.array([crop_window(height, width, chance, transform.scale, transform.ratio) for chance in chances])
    top, left, h, w = torch.from_numpy(boxes.reshape(-1, 4)).to(pixels.device, non_blocking=True).T
    mirrored = torch.tensor([chance[-1] < 0.5 for chance in chances]).to(pixels.device, non_blocking=True)
    down, across = _filter(top, h, height, size), _filter(left, w, width, size)
    across = torch.where(mirrored[:, None, None], across.flip(1), across)
    found = down[:, None] @ pixels.float() @ across[:, None].transpose(-1, -2)
    return found.round_().clamp_(0, 255).to(torch.uint8)


def _filter(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """(n, size, side) weights that resize ``length`` pixels from ``start`` on to ``size``; rows add up to 1."""
    start, length = start[:, None, None].float(), length[:, None, None].float()
    step = length / size
    centre = start + (torch.arange(size, device=start.device)[None, :, None] + 0.5) * step
    place = torch.arange(side, device=start.device)[None, None, :] + 0.5
    weight = (1 - (place - centre).abs() / step.clamp(min=1)).clamp(min=0)
    weight = weight * ((place > start) & (place < start + length))
    return weight / weight.sum(2, keepdim=True)


def erase(images: Tensor, augment_key: AugmentKey, ids: np.ndarray, transform: TransformConfig) -> Tensor:
    """Random erasing in place, on normalised images (n, C, H, W), on their device; what is drawn is drawn on the CPU.

    A share ``transform.erasing`` of the images loses a rectangle of 2 to 33 % of its area to zeros (``const``), to one
    normal colour (``rand``) or to normal noise (``pixel``).
    """
    n, channels, height, width = images.shape
    chance = uniform_from_ids(*augment_key, ids, 2 * TRIES + 4, ERASE).numpy()
    low, high = (math.log(aspect) for aspect in ERASED_ASPECT)
    area = height * width * (ERASED_AREA[0] + chance[:, :TRIES] * (ERASED_AREA[1] - ERASED_AREA[0]))
    aspect = np.exp(low + chance[:, TRIES : 2 * TRIES] * (high - low))
    h, w = np.sqrt(area * aspect).round().astype(int), np.sqrt(area / aspect).round().astype(int)
    fits = (h > 0) & (h < height) & (w > 0) & (w < width)
    first = fits.argmax(1)
    h, w = h[np.arange(n), first], w[np.arange(n), first]
    top = (chance[:, -3] * (height - h + 1)).astype(int)
    left = (chance[:, -2] * (width - w + 1)).astype(int)
    for image in np.flatnonzero((chance[:, -1] < transform.erasing) & fits.any(1)).tolist():
        rectangle = images[image, :, top[image] : top[image] + h[image], left[image] : left[image] + w[image]]
        if transform.erasing_mode == "const":
            rectangle.zero_()
            continue
        shape = rectangle.shape if transform.erasing_mode == "pixel" else (channels, 1, 1)
        generator = torch.Generator().manual_seed(int(chance[image, -4] * 2**53))  # every device draws otherwise
        rectangle.copy_(torch.randn(shape, generator=generator).to(images.device).expand_as(rectangle))
    return images


def numbers(augment_key: AugmentKey, ids: np.ndarray) -> list[int]:
    """For each image a 53-bit number that an auto-augment policy starts from."""
    return (uniform_from_ids(*augment_key, ids, 1, POLICY)[:, 0] * 2**53).long().tolist()

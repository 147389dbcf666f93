"""Resizes of 8-bit images by torch: ``data.resizer: torch``.

torch's antialiased kernels for 8-bit images weigh the same neighbours as Pillow's, with weights of 16 instead of 22
bits, and use the processor's vector instructions. So the pixels differ from Pillow's by a few steps of 255.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import Resize

from dist_prune.data.timm_transforms import CenterCropOrPad, ResizeKeepRatio, eval_transform
from dist_prune.data.transform_config import Size, TransformConfig

MODES = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}


def as_pixels(image: Image.Image | np.ndarray) -> Tensor:
    """The pixels of an image.

    Args:
        image: in RGB, of Pillow or (H, W, 3) uint8.

    Returns:
        (3, H, W) uint8, with the colours of a pixel side by side in memory, which is what the kernels are made for.
    """
    array = np.array(image) if isinstance(image, Image.Image) or not image.flags.writeable else image
    return torch.from_numpy(array).permute(2, 0, 1)


def resize(pixels: Tensor, sides: tuple[int, int], interpolation: str) -> Tensor:
    """Resize an image.

    Args:
        pixels: (C, H, W) uint8.
        sides: (height, width) of the result in pixels.
        interpolation: ``nearest``, ``bilinear`` or ``bicubic``.

    Returns:
        (C, height, width) uint8.
    """
    if tuple(pixels.shape[1:]) == sides:
        return pixels
    smooth: dict[str, Any] = {} if interpolation == "nearest" else {"antialias": True, "align_corners": False}
    return interpolate(pixels[None], sides, mode=MODES[interpolation], **smooth)[0]


class _Resize:
    """torchvision's ``Resize`` on 8-bit pixels, without its detour over floating-point numbers."""

    def __init__(self, size: int | tuple[int, ...], interpolation: str):
        self.size, self.interpolation = size, interpolation

    def __call__(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[1:]
        if not isinstance(self.size, int):
            sides = (self.size[0], self.size[-1])
        elif height <= width:
            sides = (self.size, int(self.size * width / height))
        else:
            sides = (int(self.size * height / width), self.size)
        return resize(pixels, sides, self.interpolation)


class _ResizeKeepRatio:
    """Timm's transform of that name, on 8-bit pixels."""

    def __init__(self, timms: ResizeKeepRatio, interpolation: str):
        self.timms, self.interpolation = timms, interpolation

    def __call__(self, pixels: Tensor) -> Tensor:
        height, width = self.timms.get_params(pixels, self.timms.size, self.timms.longest)
        return resize(pixels, (height, width), self.interpolation)


class _CenterCropOrPad:
    """Timm's transform of that name, whose borders have one colour for each channel."""

    def __init__(self, timms: CenterCropOrPad):
        self.timms, self.fill = timms, torch.as_tensor(timms.fill, dtype=torch.uint8).reshape(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        sides = [max(own, wanted) for own, wanted in zip(pixels.shape[1:], self.timms.size, strict=True)]
        if sides != list(pixels.shape[1:]):
            top, left = ((side - own) // 2 for side, own in zip(sides, pixels.shape[1:], strict=True))
            canvas = self.fill.repeat(1, *sides)
            canvas[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
            pixels = canvas
        return self.timms(pixels)


@lru_cache(maxsize=8)
def eval_pixels(transform: TransformConfig, size: Size) -> Callable[[Tensor], Tensor]:
    """Make timm's evaluation transform without its normalisation, for pixels.

    Args:
        transform: gives crop, crop mode and interpolation.
        size: side of the result in pixels, or (height, width).

    Returns:
        A function of (3, H, W) uint8; it returns (3, height, width) uint8.
    """
    made: Any = eval_transform(transform, size)
    *parts, _ = made.transforms  # the last one makes an array of an image
    makers: dict[type, Callable[[Any], Callable[[Tensor], Tensor]]] = {
        Resize: lambda part: _Resize(part.size, transform.interpolation),
        ResizeKeepRatio: lambda part: _ResizeKeepRatio(part, transform.interpolation),
        CenterCropOrPad: _CenterCropOrPad,
    }
    steps = [makers.get(type(part), lambda part: part)(part) for part in parts]

    def apply(pixels: Tensor) -> Tensor:
        for step in steps:
            pixels = step(pixels)
        return pixels

    return apply

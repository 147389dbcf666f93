"""Image transforms of timm: the evaluation transform of its networks with its parts, and its auto-augment policies."""

import random
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.transforms import CenterCropOrPad as CenterCropOrPad
from timm.data.transforms import ResizeKeepRatio as ResizeKeepRatio
from timm.data.transforms import str_to_pil_interp
from timm.data.transforms_factory import create_transform
from torch import Tensor

from dist_prune.data.transform_config import Size, TransformConfig, sides_of
from dist_prune.errors import PruneError, nearest

# first section of a configuration string -> pattern of its further sections
SECTIONS = {
    "rand": r"(m|n|mmax|inc)\d+|(p|mstd)\d*\.?\d+|t(weights|3aw?)",
    "augmix": r"(m|w|d|b)\d+|(a|mstd)\d*\.?\d+",
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), r"mstd\d*\.?\d+"),
}


@lru_cache(maxsize=8)
def eval_transform(transform: TransformConfig, size: Size) -> Callable[[Image.Image], Tensor]:
    """Make timm's evaluation transform without its normalisation.

    Args:
        transform: gives crop, crop mode and interpolation.
        size: side of the result in pixels, or (height, width).

    Returns:
        A function of an RGB image; it returns (3, height, width) uint8.
    """
    return create_transform(
        size,
        is_training=False,
        use_prefetcher=True,
        mean=transform.mean,
        std=transform.std,
        crop_pct=transform.crop,
        crop_mode=transform.crop_mode,
        interpolation=transform.interpolation,
    )  # type: ignore[return-value]


class AutoAugmentPolicy:
    """An auto-augment policy of timm that takes the random numbers of each image from a seed.

    Args:
        transform: gives ``auto_augment``, ``mean`` and ``interpolation``.
        size: side of the images in pixels, or (height, width).

    Raises:
        PruneError: timm does not understand ``auto_augment``.
    """

    def __init__(self, transform: TransformConfig, size: Size):
        assert transform.auto_augment is not None
        check_policy(transform.auto_augment)
        mean = transform.mean if len(transform.mean) == 3 else (transform.mean[0],) * 3
        settings: dict[str, Any] = {
            "translate_const": int(min(sides_of(size)) * 0.45),
            "img_mean": tuple(min(255, round(255 * value)) for value in mean),
            "interpolation": str_to_pil_interp(transform.interpolation),
        }
        kind = transform.auto_augment.split("-")[0]
        if kind == "augmix":
            settings["translate_pct"] = 0.3
        makers = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
        self.transform = makers.get(kind, auto_augment_transform)(transform.auto_augment, settings)

    def __call__(self, image: Image.Image, seed: int) -> Image.Image:
        """Augment one image.

        Args:
            image: in any mode.
            seed: decides every random number. The global random states are restored afterwards.

        Returns:
            The augmented image, in the same mode.
        """
        states = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            return self.transform(image.convert("RGB")).convert(image.mode)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

    def augment_batch(self, pixels: np.ndarray, seeds: list[int]) -> np.ndarray:
        """Augment a batch image by image.

        Args:
            pixels: (n, H, W, C) uint8, C 1 or 3.
            seeds: n seeds.

        Returns:
            (n, H, W, C) uint8.
        """
        out = np.empty_like(pixels)
        for index, (image_pixels, seed) in enumerate(zip(pixels, seeds, strict=True)):
            image = Image.fromarray(
                image_pixels[:, :, 0] if image_pixels.shape[2] == 1 else np.ascontiguousarray(image_pixels)
            )
            out[index] = np.asarray(self(image, seed)).reshape(image_pixels.shape)
        return out


@lru_cache(maxsize=8)
def auto_augment_policy(transform: TransformConfig, size: Size) -> AutoAugmentPolicy:
    """The policy of ``transform.auto_augment`` for images of ``size`` pixels; made once and cached."""
    return AutoAugmentPolicy(transform, size)


def check_policy(config: str) -> None:
    """Check the configuration string of an auto-augment policy, of which timm ignores unknown sections silently.

    Args:
        config: the recipe's ``data.auto_augment``.

    Raises:
        PruneError: the string begins with no policy of timm, or has an unknown section.
    """
    kind, *sections = config.split("-")
    if kind not in SECTIONS:
        raise PruneError(
            f"data.auto_augment: {config!r} begins with none of {', '.join(SECTIONS)}.{nearest(kind, SECTIONS)} "
            "For example rand-m9-mstd0.5-inc1, original, augmix-m5-w4."
        )
    wrong = [section for section in sections if not re.fullmatch(SECTIONS[kind], section)]
    if wrong:
        raise PruneError(
            f"data.auto_augment: {config!r}: timm's {kind!r} knows no {', '.join(wrong)}; its sections are those of "
            "timm.data.auto_augment, for example rand-m9-mstd0.5-inc1, original-mstd0.5, augmix-m5-w4-d2"
        )

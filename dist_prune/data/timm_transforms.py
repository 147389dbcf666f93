"""timm's image transforms: the evaluation transform of its networks, and its auto-augment policies."""

import random
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.transforms import str_to_pil_interp
from timm.data.transforms_factory import create_transform
from torch import Tensor

from dist_prune.data.transform_config import TransformConfig
from dist_prune.errors import PruneError, nearest

# what a configuration string may begin with -> what its further sections may be
SECTIONS = {
    "rand": r"(m|n|mmax|inc)\d+|(p|mstd)\d*\.?\d+|t(weights|3aw?)",
    "augmix": r"(m|w|d|b)\d+|(a|mstd)\d*\.?\d+",
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), r"mstd\d*\.?\d+"),
}


@lru_cache(maxsize=8)
def eval_transform(transform: TransformConfig, size: int) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation transform without its normalisation: an RGB image -> (3, size, size) uint8."""
    return create_transform(
        size, is_training=False, use_prefetcher=True, mean=transform.mean, std=transform.std, crop_pct=transform.crop,
        crop_mode=transform.crop_mode, interpolation=transform.interpolation,
    )  # type: ignore[return-value] # fmt: skip


class AutoAugmentPolicy:
    """One of timm's auto-augment policies, with random numbers of its own for each image."""

    def __init__(self, transform: TransformConfig, size: int):
        assert transform.auto_augment is not None
        check_policy(transform.auto_augment)
        mean = transform.mean if len(transform.mean) == 3 else (transform.mean[0],) * 3
        settings: dict[str, Any] = {
            "translate_const": int(size * 0.45),
            "img_mean": tuple(min(255, round(255 * value)) for value in mean),
            "interpolation": str_to_pil_interp(transform.interpolation),
        }
        kind = transform.auto_augment.split("-")[0]
        if kind == "augmix":
            settings["translate_pct"] = 0.3
        makers = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
        self.transform = makers.get(kind, auto_augment_transform)(transform.auto_augment, settings)

    def __call__(self, image: Image.Image, number: int) -> Image.Image:
        """The augmented image (same mode); ``number`` decides every draw, the global random states are given back."""
        before = random.getstate(), np.random.get_state()
        random.seed(number)
        np.random.seed(number % 2**32)
        try:
            return self.transform(image.convert("RGB")).convert(image.mode)
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])

    def each(self, pixels: np.ndarray, numbers: list[int]) -> np.ndarray:
        """(n, H, W, C) uint8 arrays, C 1 or 3, image by image."""
        out = np.empty_like(pixels)
        for place, (one, number) in enumerate(zip(pixels, numbers, strict=True)):
            image = Image.fromarray(one[:, :, 0] if one.shape[2] == 1 else np.ascontiguousarray(one))
            out[place] = np.asarray(self(image, number)).reshape(one.shape)
        return out


@lru_cache(maxsize=8)
def auto_augment_policy(transform: TransformConfig, size: int) -> AutoAugmentPolicy:
    """The policy of ``transform.auto_augment`` for images of a side."""
    return AutoAugmentPolicy(transform, size)


def check_policy(config: str) -> None:
    """PruneError where timm would not understand the string (or leave a part of it out without a word)."""
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

"""Colours of classes for the pictures of a report."""

import colorsys

import numpy as np

GOLDEN = 0.61803398875  # steps of the hue by which neighbouring class numbers get distant colours


def class_colours(count: int) -> np.ndarray:
    """Colours of class numbers, (count, 3) uint8; the same in every report."""
    rows = [colorsys.hsv_to_rgb(number * GOLDEN % 1, 0.85 - 0.3 * (number % 3 == 1), 0.95) for number in range(count)]
    return (np.array(rows) * 255).round().astype(np.uint8)


def blend(image: np.ndarray, colours: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
    """Lay colours over an image.

    Args:
        image: (H, W, 3) uint8.
        colours: (H, W, 3) uint8.
        where: (H, W) bool, the pixels that get a colour; None: all.

    Returns:
        (H, W, 3) uint8, 40 % image and 60 % colour.
    """
    mixed = (0.4 * image + 0.6 * colours).round().astype(np.uint8)
    return mixed if where is None else np.where(where[..., None], mixed, image)

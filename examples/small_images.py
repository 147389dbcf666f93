"""Small real images for the examples: CIFAR-10 where ``DIST_PRUNE_DATA`` has it, else scikit-learn's digits."""

import os
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def small_images(train: int = 2000, test: int = 1000) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images as tensor data sets of (image, label).

    Args:
        train: number of training images.
        test: number of test images; of the digits, those that are left.

    Returns:
        Images (n, 3, 32, 32) float, normalised; labels (n,) int64 of ten classes.
    """
    file = Path(os.environ.get("DIST_PRUNE_DATA", "."), "cifar10.npz")
    if file.is_file():
        with np.load(file) as arrays:
            parts = [
                (arrays[f"x_{part}"][:n], arrays[f"y_{part}"][:n]) for part, n in (("train", train), ("test", test))
            ]
        return tuple(_data_set(torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1, y) for x, y in parts)
    digits = load_digits()  # 1,797 images of 8x8: made 32x32, with three equal channels
    images = torch.from_numpy(digits.images).float()[:, None].expand(-1, 3, -1, -1) / 8 - 1
    images = nn.functional.interpolate(images, 32, mode="bilinear")
    order = np.random.default_rng(0).permutation(len(images))
    parts = order[:-397][:train], order[-397:][:test]
    return tuple(_data_set(images[ids], digits.target[ids]) for ids in parts)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of images that a network classifies right, in percent, in evaluation mode."""
    model.eval()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in DataLoader(data, 250))
    return 100 * right / len(data)


def _data_set(images: Tensor, labels: np.ndarray) -> TensorDataset:
    return TensorDataset(images.float().contiguous(), torch.from_numpy(labels).long())

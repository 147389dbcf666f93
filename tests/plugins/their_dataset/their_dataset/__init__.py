"""A data set of a third party: scikit-learn's digits, without the highest ones if asked for."""

import numpy as np
from sklearn.datasets import load_digits
from torch.utils.data import Dataset


class TheirDigits(Dataset):
    """Every fourth digit is for evaluation."""

    def __init__(self, train: bool, highest: int = 9):
        found = load_digits()
        keep = (np.arange(len(found["target"])) % 4 != 3) == train
        keep &= found["target"] <= highest
        self.images = (found["images"] * (255 / 16)).round().astype(np.uint8)[keep]
        self.labels = found["target"][keep]
        self.classes = [str(digit) for digit in range(highest + 1)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])

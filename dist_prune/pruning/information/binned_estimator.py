"""Shannon entropies of binned activations: a variable is the tuple of its bin codes, counted over all samples."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from dist_prune.pruning.information.estimators import Criterion, EntropyEstimator


def bin_codes(values: Tensor, edges: int = 30, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Number of the bin's upper edge, 1 to edges - 1; what lies outside falls into the first or the last bin."""
    return _count_edges_below(values, edges, low, high).clamp_(1, edges - 1)


def top_bin(values: Tensor, edges: int = 30, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Quirk: the released program's number of the bin's lower edge, taken modulo the number of edges, 0 to edges - 1.

    At or below the lowest edge (saturated tanh) it is -1, which wraps to the top edge: the bin of what is above all
    edges, and of nothing else. The bin that ends at the top edge is one of its own.
    """
    return (_count_edges_below(values, edges, low, high) - 1) % edges


def _count_edges_below(values: Tensor, edges: int, low: float, high: float) -> Tensor:
    """How many of the equally spaced edges are smaller than each value."""
    return torch.searchsorted(torch.linspace(low, high, edges, dtype=torch.float64), values.double().contiguous())


def shannon_entropy(ids: np.ndarray) -> float:
    """Entropy in bits of the frequencies of equal entries."""
    counts = np.unique(ids, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


class BinnedEstimator(EntropyEstimator):
    """All samples together, no batches.

    The tuple of a set of filters is stood for by the sum, modulo 2^64, of a random number per filter and code tuple
    (zobrist hashing): taking a filter away is one subtraction. Of n samples two different tuples fall together with
    a chance below n^2 / 2^65.

    Args:
        bins: (n, K, d) integer codes.
        labels: (n,) classes.
    """

    def __init__(self, bins: Tensor, labels: Tensor, criterion: Criterion, own: Sequence[int]):
        super().__init__(criterion, own)
        self.channel_ids = [
            np.unique(bins[:, k].numpy(), axis=0, return_inverse=True)[1].reshape(-1) for k in range(bins.shape[1])
        ]
        self.labels = labels.numpy()
        random = np.random.default_rng(0)
        draw = lambda count: random.integers(0, 2**64, count, dtype=np.uint64)  # noqa: E731
        self.hashes = [draw(len(bins))[ids] for ids in self.channel_ids]
        self.label_hashes = draw(int(self.labels.max()) + 1)[self.labels]

    def begin(self, remaining: Sequence[int]) -> None:
        super().begin(remaining)
        self.joint_ids = np.zeros(len(self.labels), dtype=np.uint64)
        for k in self.remaining:
            self.joint_ids += self.hashes[k]

    def remove(self, gone: Iterable[int]) -> None:
        gone = list(gone)
        super().remove(gone)
        for k in gone:
            self.joint_ids -= self.hashes[k]

    def alone(self, channels: Sequence[int]) -> Tensor:
        return torch.tensor([shannon_entropy(self.channel_ids[k]) for k in channels], dtype=torch.float64)

    def relevance(self, channels: Sequence[int]) -> Tensor:
        label = shannon_entropy(self.labels)
        both = [shannon_entropy(self.hashes[k] + self.label_hashes) for k in channels]
        return self.alone(channels) + label - torch.tensor(both, dtype=torch.float64)

    def joint(self, channels: Sequence[int]) -> Tensor:
        return torch.full((len(channels),), shannon_entropy(self.joint_ids), dtype=torch.float64)

    def score(self, channels: Sequence[int]) -> Tensor:
        """mi_rest: I(Z_k; Z_rest). joint and mi_all, which is the same here: H(Z_rest). cmi_label as everywhere."""
        remainder_ids = [self.joint_ids - self.hashes[k] for k in channels]
        remainder = torch.tensor([shannon_entropy(ids) for ids in remainder_ids], dtype=torch.float64)
        if self.criterion in ("joint", "mi_all"):
            return remainder
        if self.criterion == "mi_rest":
            return self.alone(channels) + remainder - self.joint(channels)
        with_labels = torch.tensor(
            [shannon_entropy(ids + self.label_hashes) for ids in remainder_ids], dtype=torch.float64
        )
        return remainder - with_labels - self.joint(channels) + shannon_entropy(self.joint_ids + self.label_hashes)

"""Shannon entropies of binned activations: a variable is the tuple of its bin codes, counted over all samples.

Entropy specification, section 4 (``bin``).
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from dist_prune.pruning.information.estimators import Criterion, EntropyEstimator


def bin_codes(values: Tensor, edges: int = 30, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Number of the upper edge of each value's bin.

    Args:
        values: activations of any shape.
        edges: number of equally spaced edges.
        low: first edge.
        high: last edge.

    Returns:
        Codes 1 to ``edges`` - 1, int64, of the same shape. Values outside the edges get the first or the last bin.
    """
    return _count_edges_below(values, edges, low, high).clamp_(1, edges - 1)


def top_bin(values: Tensor, edges: int = 30, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Number of the lower edge of each value's bin, modulo the number of edges: a quirk of the released program.

    A value at or below the lowest edge (saturated tanh) has lower edge -1, which wraps to the code of values above all
    edges. No other value gets that code: the bin that ends at the top edge has a code of its own.

    Args:
        values: activations of any shape.
        edges: number of equally spaced edges.
        low: first edge.
        high: last edge.

    Returns:
        Codes 0 to ``edges`` - 1, int64, of the same shape.
    """
    return (_count_edges_below(values, edges, low, high) - 1) % edges


def _count_edges_below(values: Tensor, edges: int, low: float, high: float) -> Tensor:
    """Number of equally spaced edges that are smaller than each value."""
    return torch.searchsorted(torch.linspace(low, high, edges, dtype=torch.float64), values.double().contiguous())


def shannon_entropy(ids: np.ndarray) -> float:
    """Entropy in bits of the frequencies of equal entries.

    Args:
        ids: (n,) integers.
    """
    counts = np.unique(ids, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


class BinnedEstimator(EntropyEstimator):
    """Shannon entropies of bin codes over all samples together, without batches.

    The code tuple of a set of filters is represented by the sum, modulo 2^64, of a random number for each filter and
    code tuple (Zobrist hashing), so removing a filter is one subtraction. Of n samples two different tuples get the
    same sum with a probability below n^2 / 2^65.

    Args:
        bins: (n, K, d) integer codes.
        labels: (n,) int64 class numbers.
        criterion: see ``EntropyEstimator``.
        own: see ``EntropyEstimator``.
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
        """See ``EntropyEstimator.begin``."""
        super().begin(remaining)
        self.joint_ids = np.zeros(len(self.labels), dtype=np.uint64)
        for k in self.remaining:
            self.joint_ids += self.hashes[k]

    def remove(self, gone: Iterable[int]) -> None:
        """See ``EntropyEstimator.remove``."""
        gone = list(gone)
        super().remove(gone)
        for k in gone:
            self.joint_ids -= self.hashes[k]

    def alone(self, channels: Sequence[int]) -> Tensor:
        """See ``EntropyEstimator.alone``."""
        return torch.tensor([shannon_entropy(self.channel_ids[k]) for k in channels], dtype=torch.float64)

    def relevance(self, channels: Sequence[int]) -> Tensor:
        """See ``EntropyEstimator.relevance``."""
        label = shannon_entropy(self.labels)
        both = [shannon_entropy(self.hashes[k] + self.label_hashes) for k in channels]
        return self.alone(channels) + label - torch.tensor(both, dtype=torch.float64)

    def joint(self, channels: Sequence[int]) -> Tensor:
        """See ``EntropyEstimator.joint``."""
        return torch.full((len(channels),), shannon_entropy(self.joint_ids), dtype=torch.float64)

    def score(self, channels: Sequence[int]) -> Tensor:
        """Criterion of each channel, see ``EntropyEstimator.score``.

        ``mi_rest`` is I(Z_k; Z_(R without k)). ``joint`` and ``mi_all``, which is the same for bins, are H(Z_(R without
        k)). ``cmi_label`` is -I(Z_k; Y | Z_(R without k)).
        """
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

"""Bandwidths of Gaussian kernels: by rule, from the data, by alignment to another kernel, or for a wanted entropy.

Distances and kernels are given by their pairs (see renyi.py); each row is one variable. Section numbers are those of
the entropy specification.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_prune.pruning.information.renyi import kernel_entropy, pairs_to_square

NEIGHBOURS, BISECTIONS = 10, 60


class BandwidthGrid(NamedTuple):
    """Bandwidths that an alignment tries, equally spaced from ``start`` to 10 mean distances.

    Attributes:
        start: smallest bandwidth.
        first: number of bandwidths in the first batches.
        later: number of bandwidths in later batches.
        until: the last batch, from 0, that uses ``first``.
        coarse: try 16 bandwidths, then 16 between the neighbours of the best one, in every batch.
    """

    start: float = 0.3
    first: int = 300
    later: int = 100
    until: int = 20
    coarse: bool = False

    def point_count(self, batch: int) -> int:
        """Number of bandwidths tried in one pass of batch number ``batch``."""
        return 16 if self.coarse else self.first if batch <= self.until else self.later


PAPER = BandwidthGrid()


def scaled_rule(n: int, features: int, gamma: float = 1.0) -> float:
    """Bandwidth gamma n^(-1 / (4 + d)) sqrt(d), a rule for features of unit variance (section 3.1).

    Args:
        n: number of samples.
        features: number d of features of the flattened variable.
        gamma: factor.
    """
    return gamma * n ** (-1 / (4 + features)) * math.sqrt(features)


def align_bandwidths(squared: Tensor, reference: Tensor, n: int, batch: int = 0, grid: BandwidthGrid = PAPER) -> Tensor:
    """Find for each variable the bandwidth that aligns its kernel best with a reference kernel (section 3.3).

    The alignment of K = exp(-D^2 / sigma^2) with the reference R is <K, R> / (|K| |R|), with Frobenius norms. The first
    of equal maxima is taken. A constant variable has the same alignment for all bandwidths and gets the first of the
    grid.

    Args:
        squared: (V, pairs) squared distances of V variables.
        reference: (pairs,) of the reference kernel, of the same dtype.
        n: number of samples.
        batch: number of the batch, from 0; later batches try fewer bandwidths.
        grid: the bandwidths to try.

    Returns:
        (V,) float64.
    """
    bandwidths = []
    reference_norm = torch.sqrt(n + 2 * (reference * reference).sum())
    tolerance = 1e-13 if squared.dtype == torch.float64 else 1e-6  # values equal up to rounding count as equal
    for row in squared:
        low = grid.start
        high = max(10 * float(2 * row.sqrt().sum() / n**2), low)
        sigmas, best = torch.empty(0), 0
        for _ in range(2 if grid.coarse else 1):
            sigmas = torch.linspace(low, high, grid.point_count(batch), dtype=torch.float64, device=row.device)
            kernels = (row * -(sigmas.to(row.dtype) ** -2)[:, None]).exp_()
            product = n + 2 * kernels @ reference
            alignment = product / (torch.sqrt(n + 2 * torch.linalg.vector_norm(kernels, dim=1) ** 2) * reference_norm)
            best = int((alignment >= alignment.max() * (1 - tolerance)).nonzero()[0])
            low, high = float(sigmas[max(best - 1, 0)]), float(sigmas[min(best + 1, len(sigmas) - 1)])
        bandwidths.append(sigmas[best])
    return torch.stack(bandwidths)


def smooth_over_batches(per_batch: Sequence[Tensor]) -> Tensor:
    """Exponential average of bandwidths in the order of the batches (section 3.3).

    s_0 = sigma_0 and s_t = 0.9 s_(t-1) + 0.1 sigma_t. The last one is used for all batches. The result depends on the
    order, so it needs the bandwidths of all batches, gathered over ranks.

    Args:
        per_batch: bandwidths of each batch, tensors of one shape.
    """
    smoothed = per_batch[0]
    for sigma in per_batch[1:]:
        smoothed = 0.9 * smoothed + 0.1 * sigma
    return smoothed


def median_bandwidth(squared: Tensor, n: int) -> Tensor:
    """Bandwidth sqrt(median of the positive D^2 / 2) of each variable; 1 if all distances are 0.

    Args:
        squared: (V, pairs) squared distances.
        n: number of samples.

    Returns:
        (V,) float64.
    """
    positive = [row[row > 0] for row in squared]
    return torch.stack(
        [torch.sqrt(row.median() / 2).double() if len(row) else row.new_ones(()).double() for row in positive]
    )


def nearest_neighbour_bandwidth(squared: Tensor, n: int) -> Tensor:
    """Mean distance of a sample to its 10 nearest neighbours, averaged over the samples; 1 if that is 0.

    Args:
        squared: (V, pairs) squared distances.
        n: number of samples.

    Returns:
        (V,) float64.
    """
    bandwidths = []
    for row in squared:
        square = pairs_to_square(row.sqrt(), n, math.inf)
        value = square.topk(min(NEIGHBOURS, n - 1), 1, largest=False).values.mean().double()
        bandwidths.append(torch.where(value > 0, value, torch.ones_like(value)))
    return torch.stack(bandwidths)


def entropy_multiplier(exponents: Sequence[Tensor], n: int, alpha: float, share: float) -> float:
    """Find the factor m at which the mean entropy of exp(-m E) over batches is ``share`` log2 n (section 3.5).

    The entropy grows with m, because exp(-(m + d) E) is the Hadamard product of two kernels. The factor is found by
    bisection on a logarithmic scale. It is 1 if all samples are alike.

    Args:
        exponents: (pairs,) summed exponents E of each batch. All batches are needed, not those of one rank.
        n: number of samples in a batch.
        alpha: order of the entropy.
        share: wanted entropy as a fraction of log2 n, between 0 and 1.
    """
    scale = sum(float(e.mean()) for e in exponents) / len(exponents)
    if scale == 0:
        return 1.0
    low = math.log(1e-9 / scale)
    high = math.log(1e9 / scale)
    target = share * math.log2(n)

    def reaches_target(log: float) -> bool:
        entropies = [float(kernel_entropy(torch.exp(e * -math.exp(log)), n, alpha)) for e in exponents]
        return sum(entropies) / len(entropies) >= target

    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if reaches_target(middle) else (middle, high)
    return math.exp((low + high) / 2)

"""Widths of Gaussian kernels: by rule, from the data, by alignment to another kernel, or for a wanted entropy.

Distances and kernels are given by their pairs (see renyi.py); one row is one variable.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_prune.pruning.information.renyi import kernel_entropy, pairs_to_square

NEIGHBOURS, BISECTIONS = 10, 60


class BandwidthGrid(NamedTuple):
    """Widths that an alignment tries: from ``start`` to 10 mean distances, ``first`` of them, ``later`` in batches
    behind number ``until``; ``coarse`` replaces them by 16 and, between the best one's neighbours, 16 more."""

    start: float = 0.3
    first: int = 300
    later: int = 100
    until: int = 20
    coarse: bool = False

    def point_count(self, batch: int) -> int:
        """Widths tried in batch number ``batch``."""
        return 16 if self.coarse else self.first if batch <= self.until else self.later


PAPER = BandwidthGrid()


def scaled_rule(n: int, features: int, gamma: float = 1.0) -> float:
    """gamma n^(-1 / (4 + d)) sqrt(d): a rule for features of unit variance."""
    return gamma * n ** (-1 / (4 + features)) * math.sqrt(features)


def align_bandwidths(squared: Tensor, reference: Tensor, n: int, batch: int = 0, grid: BandwidthGrid = PAPER) -> Tensor:
    """Per variable the width whose kernel exp(-D^2 / sigma^2) points most nearly in the anchor's direction.

    Kernel alignment: the largest <K_sigma, K_anchor> / |K_sigma| |K_anchor|; the first one among equals. A variable
    that is constant has every width, and gets the first of the grid.

    Args:
        squared: (V, pairs).
        anchor: (pairs,).
        batch: number of the batch, from 0; later ones are searched on fewer points.
    """
    bandwidths = []
    reference_norm = torch.sqrt(n + 2 * (reference * reference).sum())
    tolerance = 1e-13 if squared.dtype == torch.float64 else 1e-6  # equal up to rounding is equal
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
    """s_0 = sigma_0, s_t = 0.9 s_(t-1) + 0.1 sigma_t, in the order of the batches; the last one holds for all."""
    smoothed = per_batch[0]
    for sigma in per_batch[1:]:
        smoothed = 0.9 * smoothed + 0.1 * sigma
    return smoothed


def median_bandwidth(squared: Tensor, n: int) -> Tensor:
    """Per variable sqrt(median of the positive D^2 / 2); 1 where there is none."""
    positive = [row[row > 0] for row in squared]
    return torch.stack(
        [torch.sqrt(row.median() / 2).double() if len(row) else row.new_ones(()).double() for row in positive]
    )


def nearest_neighbour_bandwidth(squared: Tensor, n: int) -> Tensor:
    """Per variable the mean distance to the 10 nearest neighbours of a sample, averaged; 1 where it is 0."""
    bandwidths = []
    for row in squared:
        square = pairs_to_square(row.sqrt(), n, math.inf)
        value = square.topk(min(NEIGHBOURS, n - 1), 1, largest=False).values.mean().double()
        bandwidths.append(torch.where(value > 0, value, torch.ones_like(value)))
    return torch.stack(bandwidths)


def entropy_multiplier(exponents: Sequence[Tensor], n: int, alpha: float, share: float) -> float:
    """The factor of the summed exponents (one (pairs,) tensor a batch) at which the mean entropy is share log2 n.

    The entropy of exp(-m E) grows with m: exp(-(m + d) E) is the Hadamard product of two kernels. Found by bisection
    on a logarithmic scale; where all samples are alike there is nothing to find, and the factor is 1.
    """
    scale = sum(float(e.mean()) for e in exponents) / len(exponents)
    if scale == 0:
        return 1.0
    low, high, target = math.log(1e-9 / scale), math.log(1e9 / scale), share * math.log2(n)

    def reaches_target(log: float) -> bool:
        entropies = [float(kernel_entropy(torch.exp(e * -math.exp(log)), n, alpha)) for e in exponents]
        return sum(entropies) / len(entropies) >= target

    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if reaches_target(middle) else (middle, high)
    return math.exp((low + high) / 2)

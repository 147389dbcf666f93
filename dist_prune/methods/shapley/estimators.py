"""Estimators of the Shapley values of channels, from accuracies without sets of channels.

C is the number of channels of a group. accuracy(T) is the accuracy of the network, in percent, when the set T of them
is off; ``full`` is that with nothing off, ``empty`` that with everything off. The Shapley value of channel c is its
mean loss of accuracy, the sum over sets T without c of |T|! (C - |T| - 1)! / C! (accuracy(T) - accuracy(T + c)).

Ancona, Oztireli, Gross: Shapley value as principled metric for structured network pruning, 2020 (permutations);
Adamczewski, Li, Van Gool: Shapley Pruning for Neural Network Compression, 2024 (regression on random sets, partial sums
over set sizes); Lundberg, Lee: A unified approach to interpreting model predictions, NeurIPS 2017 (Kernel SHAP).
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain, combinations

import numpy as np
import torch
from torch import Tensor

from dist_prune.errors import PruneError

Draw = Callable[[int], torch.Generator]  # number of a sample -> its generator
MOST_SUBSETS = 2**17  # largest number of sets that are enumerated
SMALLEST = 1e-10  # smallest singular value of a regression that counts, relative to the largest
NEAR = 0.2  # relative distance below which the number of samples is near that of unknowns


def random_sets(width: int, start: int, stop: int, draw: Draw) -> Tensor:
    """Draw sets of channels: a size uniform on 1 .. C - 1, then a random set of that size.

    Args:
        width: C.
        start: number of the first sample.
        stop: number after that of the last sample.
        draw: number of a sample -> its generator.

    Returns:
        (stop - start, C) bool, True for a channel that is off.
    """
    rows = torch.zeros((stop - start, width), dtype=torch.bool)
    for row, number in zip(rows, range(start, stop), strict=True):
        generator = draw(number)
        size = int(torch.randint(1, width, (), generator=generator))
        row[torch.randperm(width, generator=generator)[:size]] = True
    return rows


def random_permutations(width: int, count: int, draw: Draw) -> Tensor:
    """Draw ``count`` permutations, (count, C) int32: the order in which each removes the channels."""
    orders = [torch.randperm(width, generator=draw(number)) for number in range(count)]
    return torch.stack(orders).to(torch.int32) if orders else torch.zeros((0, width), dtype=torch.int32)


def permutation_prefixes(width: int, start: int, stop: int, draw: Draw) -> Tensor:
    """Compute the sets that are off in some evaluations of permutations.

    A permutation has C - 1 evaluations, after its first, second, ... removal. The last removal leaves nothing, which is
    the same for all permutations and evaluated once.

    Args:
        width: C.
        start: number of the first evaluation.
        stop: number after that of the last evaluation.
        draw: number of a permutation -> its generator.

    Returns:
        (stop - start, C) bool, True for a channel that is off.
    """
    each = width - 1
    orders = {
        number: torch.randperm(width, generator=draw(number)) for number in range(start // each, -(-stop // each))
    }
    rows = torch.zeros((stop - start, width), dtype=torch.bool)
    for row, number in zip(rows, range(start, stop), strict=True):
        row[orders[number // each][: number % each + 1]] = True
    return rows


def sizes_of(width: int, k: int, adding: bool) -> range:
    """List the sizes of the sets before and after the first ``k`` removal steps, or the last ``k`` (``adding``)."""
    return range(max(0, width - k), width + 1) if adding else range(min(k, width) + 1)


def subset_count(width: int, sizes: range) -> int:
    """Count the sets of these sizes of ``width`` channels.

    Raises:
        PruneError: they are too many to evaluate.
    """
    count = sum(math.comb(width, size) for size in sizes)
    if count > MOST_SUBSETS:
        raise PruneError(
            f"method.k: {count:,} sets of {sizes.start} to {sizes.stop - 1} of {width} channels are too many (at most "
            f"{MOST_SUBSETS:,}); lower method.k, or take method.estimator=permutation"
        )
    return count


@lru_cache(maxsize=4)
def subsets(width: int, sizes: range) -> Tensor:
    """Enumerate every set of these sizes, by size, then in lexicographic order: (n, C) bool."""
    rows = torch.zeros((subset_count(width, sizes), width), dtype=torch.bool)
    members = chain.from_iterable(combinations(range(width), size) for size in sizes)
    for row, channels in zip(rows, members, strict=True):
        row[list(channels)] = True
    return rows


def least_squares(off: Tensor, accuracy: Tensor) -> tuple[Tensor, Tensor | None]:
    """Estimate values by the unweighted regression of accuracy on the channels that are off, with intercept.

    This is the released program's estimator. Column means and the mean accuracy are subtracted first, so the intercept
    is not shrunk if samples are fewer than unknowns; the solution of smallest norm is taken then.

    Args:
        off: (m, C) bool, True for a channel that is off.
        accuracy: (m,) percent.

    Returns:
        (C,) float64 minus the coefficients; (C,) their standard errors if samples are more than unknowns, else None.
    """
    design = off.double() - off.double().mean(0)
    response = accuracy.double() - accuracy.double().mean()
    coefficients = _solve(design, response)
    freedom = len(design) - unknown_count(design.shape[1])
    if freedom <= 0:
        return -coefficients, None
    residual = response - design @ coefficients
    variance = torch.linalg.pinv(design.T @ design, hermitian=True).diagonal() * (residual @ residual / freedom)
    return -coefficients, variance.clamp(min=0).sqrt()


def kernel_shap(off: Tensor, accuracy: Tensor, full: float, empty: float) -> Tensor:
    """Estimate values whose sum is full - empty, by Kernel SHAP: weighted least squares on the losses of accuracy.

    Because sizes r were drawn uniformly, a set has the weight 1 / (r (C - r)). The constraint on the sum holds because
    every value is an equal share of it plus a rest, and the rests add up to 0. If sets are fewer than channels, the
    rests of smallest norm are taken; the numbering of the channels does not matter.

    Args:
        off: (m, C) bool, True for a channel that is off; neither all nor none.
        accuracy: (m,) percent.
        full: accuracy with nothing off, percent.
        empty: accuracy with everything off, percent.

    Returns:
        (C,) float64 values, percent.
    """
    z = off.double()
    size = off.sum(1).double()
    width = off.shape[1]
    weight = (size * (width - size)).rsqrt()[:, None]  # multiplies both sides; its square is the weight
    share = (full - empty) / width
    loss = full - accuracy.double()
    rests = _solve((z - size[:, None] / width) * weight, (loss - share * size) * weight[:, 0])
    return share + rests - rests.mean()


def unknown_count(width: int) -> int:
    """Count the unknowns of a regression on ``width`` channels: a value for each, and the intercept."""
    return width + 1


def near_threshold(samples: int, width: int) -> bool:
    """Whether a regression has about as many samples as unknowns.

    It then follows the noise of the samples, and its ranking is worse than with fewer of them.
    """
    return abs(samples - unknown_count(width)) <= NEAR * unknown_count(width)


def samples_clear_of_threshold(widths: Sequence[int], least: int) -> int:
    """Find the smallest number of samples, at least ``least``, that is near the threshold of no width."""
    while any(near_threshold(least, width) for width in widths):
        least += 1
    return least


def _solve(design: Tensor, response: Tensor) -> Tensor:
    """The least-squares solution of smallest norm, float64, without directions that are rounding errors of a mean."""
    return torch.from_numpy(np.linalg.lstsq(design.numpy(), response.numpy(), rcond=SMALLEST)[0])


def marginal_losses(order: Tensor, accuracy: Tensor, full: float, empty: float) -> Tensor:
    """Compute the loss of accuracy by each channel's removal in each permutation (Ancona et al. 2020).

    Args:
        order: (P, C) channels in the order of removal.
        accuracy: (P, C - 1) percent, after all removals but the last.
        full: accuracy with nothing off, percent.
        empty: accuracy with everything off, percent.

    Returns:
        (P, C) float64 by channel; every row adds up to full - empty. The mean over rows estimates the values.
    """
    ends = [torch.full((len(order), 1), value, dtype=torch.float64) for value in (full, empty)]
    path = torch.cat([ends[0], accuracy.double(), ends[1]], 1)
    return torch.zeros(order.shape, dtype=torch.float64).scatter_(1, order.long(), path[:, :-1] - path[:, 1:])


def values_by_size(off: Tensor, accuracy: Tensor, sizes: range) -> Tensor:
    """Sum the Shapley terms of the removal steps between sets of these sizes, with weights K! (C - K - 1)! / C!.

    K is the size of the set before the step. With all sizes 0 .. C the values are exact.

    Args:
        off: (n, C) bool, every set of these sizes once, True for a channel that is off.
        accuracy: (n,) of the sets; values have its unit.
        sizes: consecutive sizes.

    Returns:
        (C,) float64.
    """
    width = off.shape[1]
    codes = [int(code) for code in off.long().numpy().astype(object) @ [1 << c for c in range(width)]]
    known = dict(zip(codes, accuracy.tolist(), strict=True))
    values = [0.0] * width
    for code, size in zip(codes, off.sum(1).tolist(), strict=True):
        if size + 1 not in sizes:
            continue
        weight = 1 / (width * math.comb(width - 1, size))
        for c in range(width):
            if not code >> c & 1:
                values[c] += weight * (known[code] - known[code | 1 << c])
    return torch.tensor(values, dtype=torch.float64)


def reliability(values: Tensor, errors: Tensor | None) -> float:
    """Compute the share of the values' variance that is not sampling error: 1 - mean squared error / variance.

    Its square root is the expected correlation between these values and the true ones (classical test theory).

    Args:
        values: (C,).
        errors: (C,) standard errors; None: unknown.

    Returns:
        Between 0 and 1; 0 if errors are unknown.
    """
    if errors is None or not bool(errors.isfinite().all()):
        return 0.0
    variance = float(values.var(unbiased=True))
    return max(0.0, 1 - float((errors**2).mean()) / variance) if variance > 0 else 0.0


def oracle_overlap(off: Tensor, accuracy: Tensor, values: Tensor, size: int, adding: bool = False) -> float | None:
    """Compute the share of the best ``size`` channels to remove together that have the ``size`` lowest values.

    Args:
        off: (n, C) bool, sets that were evaluated, True for a channel that is off.
        accuracy: (n,) of the sets, in any unit.
        values: (C,).
        size: number of channels.
        adding: compare the best ``size`` channels to keep with those that have the highest values.

    Returns:
        Between 0 and 1; None unless every set of that size was evaluated.
    """
    width = off.shape[1]
    candidates = (off.sum(1) == (width - size if adding else size)).nonzero()[:, 0]
    if size >= width or len(candidates) != math.comb(width, size):
        return None
    best = off[candidates[accuracy[candidates].argmax()]]
    ranked = sorted(range(width), key=lambda c: (float(values[c]), c), reverse=adding)[:size]
    is_best = ~best if adding else best
    return float(is_best[ranked].double().mean())


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Compute Spearman's rank correlation of two (C,) vectors; among equal values the smaller index ranks lower."""
    a, b = (values.argsort(stable=True).argsort().double() for values in (first, second))
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])

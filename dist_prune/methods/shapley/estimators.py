"""Shapley values of channels from coalitions, in terms of what is removed.

A game says how many of n images a network gets right when the set T of C channels is off; accuracies are in percent,
``full`` with nothing off, ``empty`` with everything off. The value of channel c is its mean loss of accuracy
sum over T without c of |T|! (C - |T| - 1)! / C! (accuracy(T) - accuracy(T + c)).
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
MOST_SUBSETS = 2**17
SMALLEST = 1e-10  # singular values of a regression, relative to the largest
NEAR = 0.2  # of as many samples as unknowns


def random_sets(width: int, start: int, stop: int, draw: Draw) -> Tensor:
    """Samples ``start`` .. ``stop`` - 1 of (width,) bool: a size uniform on 1 .. C - 1, then a random set of that
    size."""
    rows = torch.zeros((stop - start, width), dtype=torch.bool)
    for row, number in zip(rows, range(start, stop), strict=True):
        generator = draw(number)
        size = int(torch.randint(1, width, (), generator=generator))
        row[torch.randperm(width, generator=generator)[:size]] = True
    return rows


def random_permutations(width: int, count: int, draw: Draw) -> Tensor:
    """(count, C) int32: the order in which each permutation removes the channels."""
    found = [torch.randperm(width, generator=draw(number)) for number in range(count)]
    return torch.stack(found).to(torch.int32) if found else torch.zeros((0, width), dtype=torch.int32)


def permutation_prefixes(width: int, start: int, stop: int, draw: Draw) -> Tensor:
    """Evaluations ``start`` .. ``stop`` - 1, C - 1 for each permutation: after the first, the second, ... removal.

    The last removal leaves nothing, which is the same for all permutations and evaluated once.
    """
    each = width - 1
    found = {number: torch.randperm(width, generator=draw(number)) for number in range(start // each, -(-stop // each))}
    rows = torch.zeros((stop - start, width), dtype=torch.bool)
    for row, number in zip(rows, range(start, stop), strict=True):
        row[found[number // each][: number % each + 1]] = True
    return rows


def sizes_of(width: int, k: int, adding: bool) -> range:
    """The sizes of the sets that removal steps up to ``k`` (``adding``: from C - k on) go through."""
    return range(max(0, width - k), width + 1) if adding else range(min(k, width) + 1)


def subset_count(width: int, sizes: range) -> int:
    """How many sets of these sizes there are; PruneError where nobody could evaluate them."""
    count = sum(math.comb(width, size) for size in sizes)
    if count > MOST_SUBSETS:
        raise PruneError(
            f"method.k: {count:,} sets of {sizes.start} to {sizes.stop - 1} of {width} channels are too many (at most "
            f"{MOST_SUBSETS:,}); lower method.k, or take method.estimator=permutation"
        )
    return count


@lru_cache(maxsize=4)
def subsets(width: int, sizes: range) -> Tensor:
    """(n, C) bool: every set of these sizes, by size, then in lexicographic order."""
    rows = torch.zeros((subset_count(width, sizes), width), dtype=torch.bool)
    every = chain.from_iterable(combinations(range(width), size) for size in sizes)
    for row, chosen in zip(rows, every, strict=True):
        row[list(chosen)] = True
    return rows


def least_squares(off: Tensor, accuracy: Tensor) -> tuple[Tensor, Tensor | None]:
    """Values by the regression of accuracy on who is off, with intercept, unweighted.

    Column means and the mean accuracy are subtracted before, so the intercept is free where samples are fewer than
    unknowns too: there the shortest values are taken, and a mean that is far from 0 does not shrink them.

    Args:
        off: (m, C) bool.
        accuracy: (m,) percent.

    Returns:
        (C,) minus the coefficients; their standard errors where there are more samples than unknowns, else None.
    """
    z, wanted = off.double(), accuracy.double()
    z, wanted = z - z.mean(0), wanted - wanted.mean()
    found = _solve(z, wanted)
    freedom = len(z) - unknown_count(z.shape[1])
    if freedom <= 0:
        return -found, None
    rest = wanted - z @ found
    spread = torch.linalg.pinv(z.T @ z, hermitian=True).diagonal() * (rest @ rest / freedom)
    return -found, spread.clamp(min=0).sqrt()


def kernel_shap(off: Tensor, accuracy: Tensor, full: float, empty: float) -> Tensor:
    """Kernel SHAP: values (C,) whose sum is full - empty, by least squares on the losses of accuracy.

    Sets weigh 1 / (r (C - r)) where sizes r were drawn uniformly. The sum is held by writing every value as an equal
    share of it plus a rest, and the rests add up to 0: with fewer sets than channels the shortest rests are taken,
    and how channels are numbered does not matter.
    """
    z, size = off.double(), off.sum(1).double()
    width = off.shape[1]
    weight = (size * (width - size)).rsqrt()[:, None]  # of both sides: squared it is the sample's weight
    share, loss = (full - empty) / width, full - accuracy.double()
    rests = _solve((z - size[:, None] / width) * weight, (loss - share * size) * weight[:, 0])
    return share + rests - rests.mean()


def unknown_count(width: int) -> int:
    """Of a regression on the channels of a group: a value for each, and the intercept."""
    return width + 1


def near_threshold(samples: int, width: int) -> bool:
    """Whether a regression has about as many samples as unknowns: it then follows their noise, and ranks worse than
    from fewer of them."""
    return abs(samples - unknown_count(width)) <= NEAR * unknown_count(width)


def samples_clear_of_threshold(widths: Sequence[int], least: int) -> int:
    """The smallest number of samples from ``least`` on that is near no group's threshold."""
    while any(near_threshold(least, width) for width in widths):
        least += 1
    return least


def _solve(design: Tensor, wanted: Tensor) -> Tensor:
    """The shortest least-squares solution, in float64; directions that are rounding errors of a mean count as none."""
    return torch.from_numpy(np.linalg.lstsq(design.numpy(), wanted.numpy(), rcond=SMALLEST)[0])


def marginal_losses(order: Tensor, accuracy: Tensor, full: float, empty: float) -> Tensor:
    """(P, C) loss of accuracy by each channel's removal in each permutation; every row adds up to full - empty.

    Args:
        order: (P, C) the order of removal.
        accuracy: (P, C - 1) after all removals but the last.
    """
    ends = [torch.full((len(order), 1), value, dtype=torch.float64) for value in (full, empty)]
    path = torch.cat([ends[0], accuracy.double(), ends[1]], 1)
    return torch.zeros(order.shape, dtype=torch.float64).scatter_(1, order.long(), path[:, :-1] - path[:, 1:])


def values_by_size(off: Tensor, accuracy: Tensor, sizes: range) -> Tensor:
    """(C,) the Shapley sum over the removal steps between sets of these sizes, each with its weight (C-K-1)! K! / C!.

    ``off`` holds every set of these sizes once. All sizes 0 .. C: the exact values.
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
    """The share of the values' spread that is not their own error: 1 - mean squared error / variance, at least 0.

    Its root is the correlation to expect between these values and the true ones (classical test theory).
    """
    if errors is None or not bool(errors.isfinite().all()):
        return 0.0
    spread = float(values.var(unbiased=True))
    return max(0.0, 1 - float((errors**2).mean()) / spread) if spread > 0 else 0.0


def oracle_overlap(off: Tensor, accuracy: Tensor, values: Tensor, size: int, adding: bool = False) -> float | None:
    """Share of the best ``size`` channels to remove together that are among the ``size`` lowest in value.

    ``adding``: of the best set of ``size`` to keep, among the highest. None where not every such set is known.
    """
    width = off.shape[1]
    chosen = (off.sum(1) == (width - size if adding else size)).nonzero()[:, 0]
    if size >= width or len(chosen) != math.comb(width, size):
        return None
    best = off[chosen[accuracy[chosen].argmax()]]
    ranked = sorted(range(width), key=lambda c: (float(values[c]), c), reverse=adding)[:size]
    hit = ~best if adding else best
    return float(hit[ranked].double().mean())


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's: the correlation of the ranks (of equals the smaller index is lower)."""
    a, b = (values.argsort(stable=True).argsort().double() for values in (first, second))
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])

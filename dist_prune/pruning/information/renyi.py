"""Matrix-based Renyi entropy of Gram matrices, in bits, and the distances and kernels that they are made of.

Sanchez Giraldo, Rao, Principe 2015; for several variables by Hadamard products, Yu et al. 2019 (entropy specification,
section 2). A Gram matrix K of n samples has ones on its diagonal and density A = K / n. Its pairs are the
n (n - 1) / 2 entries above the diagonal, row by row.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from dist_prune.errors import PruneError

CLOSED_FORM_ORDERS = (2.0, 3.0, 4.0)  # orders that need no eigenvalues


def pairs_to_square(pairs: Tensor, n: int, diagonal: float) -> Tensor:
    """Fill symmetric matrices from their pairs.

    Args:
        pairs: (..., n (n - 1) / 2) entries above the diagonal.
        n: number of samples.
        diagonal: value of the diagonal.

    Returns:
        (..., n, n) of the same dtype.
    """
    rows, columns = upper_triangle(n, pairs.device)
    square = pairs.new_full((*pairs.shape[:-1], n, n), diagonal)
    square[..., rows, columns] = pairs
    square[..., columns, rows] = pairs
    return square


@lru_cache(maxsize=16)
def upper_triangle(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every pair: two (n (n - 1) / 2,) int64 tensors."""
    rows, columns = torch.triu_indices(n, n, 1, device=device)
    return rows, columns


def distances(x: Tensor) -> Tensor:
    """Squared Euclidean distances between the samples, for each channel.

    Args:
        x: (n, K, d) activations of n samples, floating point.

    Returns:
        (K, n (n - 1) / 2) of the same dtype, not negative.
    """
    x = x.transpose(0, 1)
    x = x - x.mean(1, keepdim=True)  # the same distances with less cancellation
    products = torch.bmm(x, x.transpose(1, 2))
    norms = products.diagonal(dim1=1, dim2=2)
    rows, columns = upper_triangle(x.shape[1], x.device)
    return (norms[:, rows] + norms[:, columns] - 2 * products[:, rows, columns]).clamp_(min=0)


def renyi_entropy(gram: Tensor, alpha: float) -> Tensor:
    """Entropy of order alpha of Gram matrices: S_alpha(A) = log2(tr A^alpha) / (1 - alpha).

    Entropy specification, section 2, step 4, with A the matrix divided by its trace.

    Negative eigenvalues are rounding noise and count as zero. The others are scaled to the sum 1, because near alpha =
    1 every error of the trace is multiplied by 1 / (1 - alpha).

    Args:
        gram: (..., n, n) symmetric, with a constant diagonal; it is divided by its trace.
        alpha: order, above 0; 1 is the Shannon limit. Orders 2, 3 and 4 need no eigenvalues.

    Returns:
        (...,) in bits, from 0 to log2 n.

    Raises:
        PruneError: alpha is not above 0.
    """
    if alpha <= 0:
        raise PruneError(f"the order alpha of an entropy is above 0, got {alpha}")
    a = gram / gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    if alpha == 2:
        return -torch.log2((a * a).sum((-2, -1)))
    if alpha in (3, 4):
        square = a @ a
        return torch.log2((square * (a if alpha == 3 else square)).sum((-2, -1))) / (1 - alpha)
    return spectral_entropy(torch.linalg.eigvalsh(a), alpha)


def spectral_entropy(values: Tensor, alpha: float) -> Tensor:
    """Entropy of order alpha of eigenvalues, summed in double precision.

    Args:
        values: (..., n) eigenvalues; negative ones count as zero, and they are scaled to the sum 1.
        alpha: order, above 0; 1 is the Shannon limit.

    Returns:
        (...,) float64 in bits.
    """
    values = values.double().clamp(min=0)
    values = values / values.sum(-1, keepdim=True)
    if alpha == 1:
        return -torch.special.xlogy(values, values).sum(-1) / math.log(2)
    return torch.log2(values.pow(alpha).sum(-1)) / (1 - alpha)


def kernel_entropy(kernel: Tensor, n: int, alpha: float) -> Tensor:
    """Entropy of order alpha of Gram matrices given by their pairs.

    Args:
        kernel: (..., n (n - 1) / 2) pairs; the diagonal is 1.
        n: number of samples.
        alpha: order, above 0; 1 is the Shannon limit.

    Returns:
        (...,) in bits.
    """
    if alpha == 2:
        return -torch.log2((n + 2 * (kernel * kernel).sum(-1)) / n**2)
    if kernel.dim() == 1:
        return renyi_entropy(pairs_to_square(kernel, n, 1.0), alpha)
    # One matrix at a time: its eigenvalues must not depend on the matrices solved with it.
    flat = kernel.reshape(-1, kernel.shape[-1])
    entropies = torch.stack([renyi_entropy(pairs_to_square(row, n, 1.0), alpha) for row in flat])
    return entropies.view(kernel.shape[:-1])


def label_kernel(labels: Tensor, sigma: float = 0.1, softmax_over: int = 0) -> Tensor:
    """Gaussian kernel of one-hot labels (specification, section 2).

    Args:
        labels: (n,) int64 class numbers.
        sigma: bandwidth.
        softmax_over: number of classes of a softmax of the one-hot vectors, as in the released program; 0: no softmax.

    Returns:
        (n (n - 1) / 2,) float64 pairs.
    """
    rows, columns = upper_triangle(len(labels), labels.device)
    squared = 2.0
    if softmax_over:
        squared = 2 * ((math.e - 1) / (math.e + softmax_over - 1)) ** 2
    different = labels[rows] != labels[columns]
    return torch.where(different, math.exp(-squared / (2 * sigma**2)), 1.0).to(torch.float64)


def gaussian_kernel(squared: Tensor, sigma: float, halved: bool = True) -> Tensor:
    """Gaussian kernel exp(-D^2 / (2 sigma^2)).

    Args:
        squared: (..., pairs) squared distances D^2.
        sigma: bandwidth, in units of the distances.
        halved: whether the factor 2 is there; False: exp(-D^2 / sigma^2).

    Returns:
        (..., pairs) of the same dtype.
    """
    return torch.exp(squared / -((2.0 if halved else 1.0) * sigma**2))

"""Thresholds on the integer scores of blocks: a quantile over all layers, and its cap in one layer."""

import numpy as np


def global_threshold(tables: list[np.ndarray], weights: list[np.ndarray], p: float, quantile: str) -> int:
    """Compute the largest score that is cut: the quantile ``p`` of the scores of all pairs of layers together.

    Args:
        tables: (child groups, parent groups) int64 of each pair, scores that rise with the mutual information.
        weights: (child groups, parent groups) int64 of each pair, number of weights in each block.
        p: quantile, above 0 and up to 1.
        quantile: ``distinct``, the released program's: entry round(p U) of the U distinct scores, or the last one if
            that is beyond them. ``entries`` and ``weights``: the smallest score with which at least p of the blocks,
            or of the weights in them, are cut.
    """
    values = np.concatenate([table.ravel() for table in tables])
    distinct, position = np.unique(values, return_inverse=True)
    if quantile == "distinct":
        return int(distinct[min(round(p * len(distinct)), len(distinct) - 1)])
    mass = np.concatenate([w.ravel() for w in weights]) if quantile == "weights" else np.ones(len(values), np.int64)
    cut = np.cumsum(np.bincount(position.ravel(), weights=mass))
    return int(distinct[np.searchsorted(cut, p * cut[-1] * (1 - 1e-12))])


def capped_threshold(values: np.ndarray, weights: np.ndarray, cap: float, limit: int) -> int:
    """Compute the largest threshold up to ``limit`` that cuts no more than ``cap`` of this pair's weights.

    Args:
        values: (child groups, parent groups) int64 scores of the pair.
        weights: (child groups, parent groups) int64, number of weights in each block.
        cap: the paper's gamma, a share of the pair's weights.
        limit: the global threshold.

    Returns:
        The threshold; a number below all scores if even the smallest cuts too much.
    """
    below = np.unique(values[values <= limit])
    allowed = [int(value) for value in below if weights[values <= value].sum() <= cap * weights.sum()]
    return max(allowed, default=int(values.min()) - 1)

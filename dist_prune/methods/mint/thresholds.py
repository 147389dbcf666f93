"""Thresholds on integer scores of blocks: what a quantile of all layers cuts, and what a cap leaves of it in one."""

import numpy as np


def global_threshold(tables: list[np.ndarray], weights: list[np.ndarray], p: float, quantile: str) -> int:
    """The largest value that is cut (section 5): the quantile ``p`` of all tables' values together.

    ``distinct``: entry round(p U) of the U distinct values, the last one where that is beyond them. ``entries`` and
    ``weights``: the smallest value with which at least p of the blocks, or of the weights in them, go.
    """
    values = np.concatenate([table.ravel() for table in tables])
    distinct, place = np.unique(values, return_inverse=True)
    if quantile == "distinct":
        return int(distinct[min(round(p * len(distinct)), len(distinct) - 1)])
    mass = np.concatenate([w.ravel() for w in weights]) if quantile == "weights" else np.ones(len(values), np.int64)
    gone = np.cumsum(np.bincount(place.ravel(), weights=mass))
    return int(distinct[np.searchsorted(gone, p * gone[-1] * (1 - 1e-12))])


def capped_threshold(values: np.ndarray, weights: np.ndarray, cap: float, limit: int) -> int:
    """The largest threshold up to ``limit`` that cuts no more than ``cap`` of this pair's weights."""
    below = np.unique(values[values <= limit])
    fitting = [int(v) for v in below if weights[values <= v].sum() <= cap * weights.sum()]
    return max(fitting, default=int(values.min()) - 1)

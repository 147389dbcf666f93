"""WHC: a filter's norm times its dissimilarity to the other large filters of its layer.

Chen, Sun, Huang: WHC: Weighted Hybrid Criterion for Filter Pruning on Convolutional Neural Networks, ICASSP 2023:

    s_i = ||F_i|| sum over j != i of ||F_j|| (1 - |cos(F_i, F_j)|)

The paper prunes once, the same share of every layer. It needs no images, labels or gradients.
"""

import torch
from torch import Tensor

from dist_prune.methods import base


class Whc(base.WeightRanking):
    """Small filters, and filters parallel to other large ones, go first."""

    paper = "Chen et al., WHC: Weighted Hybrid Criterion for Filter Pruning, ICASSP 2023"

    def filter_scores(self, filters: Tensor) -> Tensor:
        return hybrid(filters)


def hybrid(filters: Tensor) -> Tensor:
    """The criterion of every filter, as the sum over j != i of ||F_i|| ||F_j|| - |<F_i, F_j>|.

    Args:
        filters: (C, D) floating point, one flattened filter per row.

    Returns:
        (C,) of the same dtype.
    """
    norms = filters.norm(dim=1)
    dissimilarity = torch.outer(norms, norms) - (filters @ filters.T).abs()
    return dissimilarity.fill_diagonal_(0).sum(1)

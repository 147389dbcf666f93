"""WHC: a filter counts by its norm and by how unlike the other large filters it is.

Chen, Sun, Huang: WHC: Weighted Hybrid Criterion for Filter Pruning on Convolutional Neural Networks, ICASSP 2023.
"""

import torch
from torch import Tensor

from dist_prune.methods import base


class Whc(base.WeightRanking):
    """|F_i| times the sum over j of |F_j| (1 - |cos(F_i, F_j)|); single shot, the same share of every layer."""

    paper = "Chen et al., WHC: Weighted Hybrid Criterion for Filter Pruning, ICASSP 2023"

    def filter_scores(self, filters: Tensor) -> Tensor:
        return hybrid(filters)


def hybrid(filters: Tensor) -> Tensor:
    """(C, D) -> (C,): |F_i| sum_j |F_j| (1 - |cos|) = sum_j (|F_i| |F_j| - |<F_i, F_j>|), without j = i."""
    norms = filters.norm(dim=1)
    unlike = torch.outer(norms, norms) - (filters @ filters.T).abs()
    return unlike.fill_diagonal_(0).sum(1)

"""L2 magnitude: a filter's score is the Euclidean norm of its weights, its bias left out.

He, Kang, Dong, Fu, Yang: Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks, IJCAI 2018, equation
2.
"""

from torch import Tensor

from dist_prune.methods import base


class L2(base.WeightRanking):
    """Small filters go first."""

    paper = "He et al., Soft Filter Pruning, IJCAI 2018 (its criterion; cut at once)"

    def filter_scores(self, filters: Tensor) -> Tensor:
        return filters.norm(dim=1)

"""L1 magnitude: a filter's score is the sum of its absolute weights.

Li, Kadav, Durdanovic, Samet, Graf: Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.
"""

from torch import Tensor

from dist_prune.methods import base


class L1(base.WeightRanking):
    """Small filters go first."""

    paper = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017"

    def filter_scores(self, filters: Tensor) -> Tensor:
        return filters.abs().sum(1)

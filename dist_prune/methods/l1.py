"""L1 magnitude: the sum of a filter's absolute weights.

Li, Kadav, Durdanovic, Samet, Graf: Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.1:

    s_i = sum of |w| over the weights w of filter F_i, without its bias

It needs no images, labels or gradients.
"""

from torch import Tensor

from dist_prune.methods import base


class L1(base.WeightRanking):
    """Filters of small L1 norm go first."""

    paper = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017"

    def filter_scores(self, filters: Tensor) -> Tensor:
        return filters.abs().sum(1)

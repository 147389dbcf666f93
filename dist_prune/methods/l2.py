"""L2 magnitude: the Euclidean norm of a filter's weights.

He, Kang, Dong, Fu, Yang: Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks, IJCAI 2018,
equation 2 with p = 2:

    s_i = ||F_i||_2 = (sum of w^2 over the weights w of filter F_i, without its bias)^(1/2)

The paper zeroes filters softly while it trains; here they are removed at once. It needs no images, labels or gradients.
"""

from torch import Tensor

from dist_prune.methods import base


class L2(base.WeightRanking):
    """Filters of small L2 norm go first."""

    paper = "He et al., Soft Filter Pruning, IJCAI 2018 (its criterion; cut at once)"

    def filter_scores(self, filters: Tensor) -> Tensor:
        return filters.norm(dim=1)

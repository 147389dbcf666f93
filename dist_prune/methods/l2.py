"""L2 magnitude: a filter's score is the Euclidean norm of its weights, its bias left out.

He, Kang, Dong, Fu, Yang: Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks, IJCAI 2018, equation
2.
"""

from collections.abc import Mapping

from torch import Tensor

from dist_prune.methods import method
from dist_prune.pruning.channels import Channels


class L2(method.Ranking):
    """Small filters go first."""

    paper = "He et al., Soft Filter Pruning, IJCAI 2018 (its criterion; cut at once)"
    units = True
    Options = method.CoupledOptions

    def score(self, bench: method.Bench) -> method.Scores:
        """``<site>``: (C,) float64, the L2 norm of each filter."""
        return {site.name: bench.weight(site).double().flatten(1).norm(dim=1) for site in bench.sites}

    def worth(self, scores: Mapping[str, Tensor], channels: Channels) -> dict[str, Tensor]:
        return self.coupled(scores, channels)

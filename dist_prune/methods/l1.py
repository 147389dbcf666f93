"""L1 magnitude: a filter's score is the sum of its absolute weights.

Li, Kadav, Durdanovic, Samet, Graf: Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.
"""

from collections.abc import Mapping

from torch import Tensor

from dist_prune.methods import method
from dist_prune.pruning.channels import Channels


class L1(method.Ranking):
    """Small filters go first."""

    paper = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017"
    units = True
    Options = method.CoupledOptions

    def score(self, bench: method.Bench) -> method.Scores:
        """``<site>``: (C,) float64, the L1 norm of each filter."""
        return {site.name: bench.weight(site).double().abs().flatten(1).sum(1) for site in bench.sites}

    def worth(self, scores: Mapping[str, Tensor], channels: Channels) -> dict[str, Tensor]:
        return self.coupled(scores, channels)

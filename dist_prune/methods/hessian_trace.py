"""Hessian trace: a filter's squared norm times the mean curvature of its weights.

Yu, Yao, Gholami, Dong, Kim, Mahoney, Keutzer: Hessian-Aware Pruning and Optimal Neural Implant, WACV 2022, section 3.2.
"""

from collections.abc import Mapping

from torch import Tensor

from dist_prune.methods import method
from dist_prune.pruning.channels import Channels
from dist_prune.pruning.curvature import Hutchinson, means


class HessianTrace(method.Ranking):
    """|F|^2 Tr(H) / (2 p), p weights, Tr by Hutchinson with other random signs for every micro-batch."""

    paper = "Yu et al., Hessian-Aware Pruning and Optimal Neural Implant, WACV 2022"
    equivariant = False  # the random signs belong to places

    def score(self, bench: method.Bench) -> method.Scores:
        """``<layer>:weight``: (C,) float64; negative where the estimated curvature is."""
        statistic = Hutchinson(bench.draw("hutchinson").initial_seed(), scaled=False)
        found, scores = bench.observe([site.at_weight for site in bench.sites], statistic, backward=True), {}
        for site in bench.sites:
            weight = bench.weight(site).double().flatten(1)
            name = site.at_weight.name
            scores[name] = weight.square().sum(1) * means(found[name]) / (2 * weight.shape[1])
        return scores

    def worth(self, scores: Mapping[str, Tensor], channels: Channels) -> dict[str, Tensor]:
        return self.summed(scores, channels, "weight")

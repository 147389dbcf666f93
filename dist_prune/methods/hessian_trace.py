"""Hessian trace: a filter's squared norm times the mean curvature of its weights.

Yu, Yao, Gholami, Dong, Kim, Mahoney, Keutzer: Hessian-Aware Pruning and Optimal Neural Implant, WACV 2022, section 3.2.
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from dist_prune.methods import method
from dist_prune.pruning.channels import Channels
from dist_prune.pruning.curvature import Hutchinson, means


class Options(method.RankingOptions):
    probes: int = Field(
        default=1, ge=1, le=10**6,
        description="passes over the images, each with signs of its own; the estimate is noisy: one number per filter, "
        "micro-batch and pass, in which all layers' weights take part",
    )  # fmt: skip


class HessianTrace(method.Ranking):
    """|F|^2 Tr(H) / (2 p), p weights, Tr by Hutchinson with other random signs for every micro-batch."""

    paper = "Yu et al., Hessian-Aware Pruning and Optimal Neural Implant, WACV 2022"
    Options = Options
    equivariant = False  # the random signs belong to places

    def score(self, bench: method.Bench) -> method.Scores:
        """``<layer>:weight``: (C,) float64; negative where the estimated curvature is."""
        sites = [site.at_weight for site in bench.sites]
        seeds = [bench.draw("hutchinson", probe).initial_seed() for probe in range(self.options.probes)]
        passes = [bench.observe(sites, Hutchinson(seed, scaled=False), backward=True) for seed in seeds]
        scores = {}
        for site in bench.sites:
            weight = bench.weight(site).double().flatten(1)
            name = site.at_weight.name
            scores[name] = (
                weight.square().sum(1)
                * torch.stack([means(found[name]) for found in passes]).mean(0)
                / (2 * weight.shape[1])
            )
        return scores

    def worth(self, scores: Mapping[str, Tensor], channels: Channels) -> dict[str, Tensor]:
        return self.summed(scores, channels, "weight")

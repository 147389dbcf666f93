"""Hessian trace: a filter's squared norm times the mean curvature of its weights.

Yu, Yao, Gholami, Dong, Kim, Mahoney, Keutzer: Hessian-Aware Pruning and Optimal Neural Implant, WACV 2022, section 3.2.
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from dist_prune.methods import base
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.curvature import Hutchinson, mean_rows


class Options(base.RankingOptions):
    probes: int = Field(
        default=1, ge=1, le=10**6,
        description="passes over the images, each with signs of its own; the estimate is noisy: one number per filter, "
        "micro-batch and pass, in which all layers' weights take part",
    )  # fmt: skip


class HessianTrace(base.RankingMethod):
    """|F|^2 Tr(H) / (2 p), p weights, Tr by Hutchinson with other random signs for every micro-batch."""

    paper = "Yu et al., Hessian-Aware Pruning and Optimal Neural Implant, WACV 2022"
    Options = Options
    equivariant = False  # the random signs belong to places

    def score(self, context: base.ScoringContext) -> base.Scores:
        """``<layer>:weight``: (C,) float64; negative where the estimated curvature is."""
        points = [point.at_weight for point in context.hook_points]
        seeds = [context.generator("hutchinson", probe).initial_seed() for probe in range(self.options.probes)]
        passes = [context.collect(points, Hutchinson(seed, scaled=False), backward=True) for seed in seeds]
        scores = {}
        for point in context.hook_points:
            weight = context.weight(point).double().flatten(1)
            name = point.at_weight.name
            scores[name] = (
                weight.square().sum(1)
                * torch.stack([mean_rows(found[name]) for found in passes]).mean(0)
                / (2 * weight.shape[1])
            )
        return scores

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        return self.sum_over_layers(scores, graph, "weight")

"""Hessian trace: a filter's squared norm times the mean curvature of its weights.

Yu, Yao, Gholami, Dong, Kim, Mahoney, Keutzer: Hessian-Aware Pruning and Optimal Neural Implant, WACV 2022, section 3.2:

    s_i = ||F_i||_2^2 Tr(H_i) / (2 p_i)

H_i is the Hessian of the loss with respect to the p_i weights of filter F_i. Its trace is estimated by Hutchinson's
method: the mean of v^T (H v) over random signs v, drawn anew for every micro-batch. It needs calibration images, their
labels and second derivatives.
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from dist_prune.methods import base
from dist_prune.methods.needs import Needs
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.curvature import Hutchinson, mean_rows


class Options(base.RankingOptions):
    """Options of the Hessian trace.

    Attributes:
        probes: passes over the images, each with random signs of its own.
    """

    probes: int = Field(
        default=1, ge=1, le=10**6,
        description="passes over the images, each with random signs of its own; one noisy number per filter, "
        "micro-batch and pass",
    )  # fmt: skip


class HessianTrace(base.RankingMethod):
    """Filters of small norm and small curvature go first; coupled filters add up."""

    paper = "Yu et al., Hessian-Aware Pruning and Optimal Neural Implant, WACV 2022"
    needs = Needs(labels=True, gradients=True, backward=2, note="for each of method.probes")
    Options = Options
    equivariant = False  # the random signs belong to positions

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Estimate the trace for every filter.

        Returns:
            ``<producer>:weight``: (C,) float64; negative if the estimated curvature is.

        Raises:
            PruneError: a layer of the network has no second derivative.
        """
        points = [point.at_weight for point in context.hook_points]
        seeds = [context.generator("hutchinson", probe).initial_seed() for probe in range(self.options.probes)]
        passes = [context.collect(points, Hutchinson(seed, scaled=False), backward=True) for seed in seeds]
        scores = {}
        for point in context.hook_points:
            weight = context.weight(point).double().flatten(1)
            name = point.at_weight.name
            scores[name] = (
                weight.square().sum(1)
                * torch.stack([mean_rows(tables[name]) for tables in passes]).mean(0)
                / (2 * weight.shape[1])
            )
        return scores

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        return self.sum_over_layers(scores, graph, "weight")

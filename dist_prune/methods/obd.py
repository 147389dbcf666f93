"""Optimal Brain Damage with a diagonal Hessian: the loss rises by h w^2 / 2 for each weight that goes.

LeCun, Denker, Solla: Optimal Brain Damage, NIPS 1989, summed over the weights of a filter.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from dist_prune.methods import base
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.curvature import Hutchinson, SquaredChange, mean_rows


class Options(base.RankingOptions):
    diagonal: Literal["fisher", "hutchinson"] = Field(
        default="fisher",
        description="h: squared gradients of micro-batches (ranks as taylor's form weight does: half of it), or "
        "Hutchinson's estimate by random signs, which can be negative",
    )


class Obd(base.RankingMethod):
    """The sum over the filters of a coupled group: all of them are changes of one loss."""

    paper = "LeCun, Denker, Solla, Optimal Brain Damage, NIPS 1989"
    Options = Options

    def score(self, context: base.ScoringContext) -> base.Scores:
        """``<layer>:weight``: (C,) float64, the sum of h w^2 / 2 over each filter."""
        fisher = self.options.diagonal == "fisher"
        statistic = (
            SquaredChange() if fisher else Hutchinson(context.generator("hutchinson").initial_seed(), scaled=True)
        )
        found = context.collect([point.at_weight for point in context.hook_points], statistic, backward=True)
        return {name: mean_rows(tables) / 2 for name, tables in found.items()}

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        return self.sum_over_layers(scores, graph, "weight")

"""Optimal Brain Damage: the rise of the loss by a diagonal Hessian when a filter's weights become zero.

LeCun, Denker, Solla: Optimal Brain Damage, NIPS 1989, the saliency h_ww w^2 / 2 summed over the weights of a filter:

    s_i = 1/2 sum over the weights w of filter F_i of h_ww w^2

h_ww is the second derivative of the loss, approximated by squared gradients of micro-batches (the empirical Fisher) or
estimated by Hutchinson's method. It needs calibration images, their labels and gradients; second derivatives with
``diagonal=hutchinson``.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from dist_prune.methods import base
from dist_prune.methods.needs import GRADIENTS
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.curvature import Hutchinson, SquaredChange, mean_rows


class Options(base.RankingOptions):
    """Options of Optimal Brain Damage.

    Attributes:
        diagonal: how the diagonal of the Hessian is approximated.
    """

    diagonal: Literal["fisher", "hutchinson"] = Field(
        default="fisher",
        description="approximation of the Hessian's diagonal: squared gradients of micro-batches (half of taylor's "
        "form weight), or Hutchinson's estimate by random signs, which can be negative",
    )


class Obd(base.RankingMethod):
    """Filters whose removal raises the loss least go first; the filters of a coupled group add up."""

    paper = "LeCun, Denker, Solla, Optimal Brain Damage, NIPS 1989"
    needs = GRADIENTS
    Options = Options

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Compute the saliency of every filter.

        Returns:
            ``<producer>:weight``: (C,) float64, the sum of h_ww w^2 / 2 in nats.

        Raises:
            PruneError: ``diagonal=hutchinson``, and a layer of the network has no second derivative.
        """
        fisher = self.options.diagonal == "fisher"
        statistic = (
            SquaredChange() if fisher else Hutchinson(context.generator("hutchinson").initial_seed(), scaled=True)
        )
        tables = context.collect([point.at_weight for point in context.hook_points], statistic, backward=True)
        return {name: mean_rows(own) / 2 for name, own in tables.items()}

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        return self.sum_over_layers(scores, graph, "weight")

"""Optimal Brain Damage with a diagonal Hessian: the loss rises by h w^2 / 2 for each weight that goes.

LeCun, Denker, Solla: Optimal Brain Damage, NIPS 1989, summed over the weights of a filter.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from dist_prune.methods import method
from dist_prune.pruning.channels import Channels
from dist_prune.pruning.curvature import Hutchinson, Squares, means


class Options(method.RankingOptions):
    diagonal: Literal["fisher", "hutchinson"] = Field(
        default="fisher",
        description="h: squared gradients of micro-batches (ranks as taylor's form weight does: half of it), or "
        "Hutchinson's estimate by random signs, which can be negative",
    )


class Obd(method.Ranking):
    """The sum over the filters of a coupled group: all of them are changes of one loss."""

    paper = "LeCun, Denker, Solla, Optimal Brain Damage, NIPS 1989"
    Options = Options

    def score(self, bench: method.Bench) -> method.Scores:
        """``<layer>:weight``: (C,) float64, the sum of h w^2 / 2 over each filter."""
        fisher = self.options.diagonal == "fisher"
        statistic = Squares() if fisher else Hutchinson(bench.draw("hutchinson").initial_seed(), scaled=True)
        found = bench.observe([site.at_weight for site in bench.sites], statistic, backward=True)
        return {name: means(tables) / 2 for name, tables in found.items()}

    def worth(self, scores: Mapping[str, Tensor], channels: Channels) -> dict[str, Tensor]:
        return self.summed(scores, channels, "weight")

"""Taylor: how much the loss would change, to first order, without the channel.

Molchanov, Mallya, Tyree, Frosio, Kautz: Importance Estimation for Neural Network Pruning, CVPR 2019, section 3.
The unit of a square is the micro-batch (score.micro_batch), whose images do not depend on the number of processes.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from dist_prune.methods import base
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.consumers import GateGradient, consumer_points, flatten_tables, sum_consumers
from dist_prune.pruning.hooks.curvature import FirstOrderChange, SquaredChange, mean_rows


class Options(base.RankingOptions):
    form: Literal["gate", "weight", "grouped"] = Field(
        default="gate",
        description="gate: the paper's FO-BN, one gate per channel: (scale g_scale + shift g_shift)^2 of a batch norm; "
        "weight: the sum of (g w)^2 over a filter's weights; grouped: (the sum of g w)^2",
    )
    blocks: bool = base.select_only(
        True, description="a residual stream's score is divided by the blocks that add to it, as the authors do"
    )


class Taylor(base.RankingMethod):
    """Coupled layers are one sum before it is squared: one gate, shared by all that consume the channel."""

    paper = "Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019"
    units = True
    Options = Options

    def score(self, context: base.ScoringContext) -> base.Scores:
        """``gate``: ``<layer>:in:gate`` (n, C) float64, a row per micro-batch, and ``<layer>:in:batches``;
        else: ``<layer>:weight`` (C,) float64."""
        if self.options.form == "gate":
            return flatten_tables(
                context.collect(consumer_points(context.graph), GateGradient(batches=True), backward=True)
            )
        points = [point.at_weight for point in context.sites]
        if self.options.form == "grouped":
            found = context.collect(points, FirstOrderChange(), backward=True)
            return {name: mean_rows(tables, power=2) for name, tables in found.items()}
        return {
            name: mean_rows(tables) for name, tables in context.collect(points, SquaredChange(), backward=True).items()
        }

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        if self.options.form == "gate":
            gates = sum_consumers(scores, graph, "gate")
            count = int(self.require_score(scores, f"{consumer_points(graph)[0].name}:batches"))
            found = {name: table.square().sum(0) / count for name, table in gates.items()}
        else:
            found = self.sum_over_layers(scores, graph, "weight")
        if self.options.blocks:  # the first producer is the stem or the projection, each other one ends a block
            found = {g.name: found[g.name] / max(1, len(g.producers) - 1) for g in graph.free}
        return found

"""Taylor: the squared change of the loss, to first order, when a channel is set to zero.

Molchanov, Mallya, Tyree, Frosio, Kautz: Importance Estimation for Neural Network Pruning, CVPR 2019, section 3:

    gate     s_i = mean over micro-batches b of (dL_b/dz_i)^2, with a gate z_i = 1 after the batch norm
    weight   s_i = mean over b of the sum over the weights w of filter F_i of (g_w w)^2
    grouped  s_i = mean over b of (sum over the weights w of filter F_i of g_w w)^2

L_b is the mean loss of a micro-batch (``score.micro_batch`` images) and g its gradient. The images of a micro-batch do
not depend on the number of processes. It needs calibration images, their labels and gradients.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from dist_prune.methods import base
from dist_prune.methods.needs import GRADIENTS
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.consumers import GateGradient, consumer_points, flatten_tables, sum_consumers
from dist_prune.pruning.hooks.curvature import FirstOrderChange, SquaredChange, mean_rows


class Options(base.RankingOptions):
    """Options of Taylor.

    Attributes:
        form: which of the paper's first-order forms.
        blocks: whether the score of a residual stream is divided by the number of blocks that add to it.
    """

    form: Literal["gate", "weight", "grouped"] = Field(
        default="gate",
        description="first-order form; gate: the paper's FO-BN, one gate per channel, (scale g_scale + shift g_shift)^2"
        " of a batch norm; weight: the sum of (g w)^2 over a filter's weights; grouped: (the sum of g w)^2",
    )
    blocks: bool = base.select_only(
        True, description="division of a residual stream's score by the number of blocks that add to it (authors' code)"
    )


class Taylor(base.RankingMethod):
    """Channels whose removal changes the loss least go first.

    The layers that consume a channel share one gate, so their gradients are added before they are squared.
    """

    paper = "Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019"
    needs = GRADIENTS
    units = True
    Options = Options

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Collect the gradients of gates, or of weights, per micro-batch.

        Returns:
            Form ``gate``: for each consuming layer ``<layer>:in:gate``, (n, positions) float64, the gradient of each
            micro-batch in the row of its first image, zero elsewhere; and ``<layer>:in:batches``, () int64, the number
            of micro-batches. Forms ``weight`` and ``grouped``: ``<producer>:weight``, (C,) float64.
        """
        if self.options.form == "gate":
            return flatten_tables(
                context.collect(consumer_points(context.graph), GateGradient(batches=True), backward=True)
            )
        points = [point.at_weight for point in context.hook_points]
        if self.options.form == "grouped":
            tables = context.collect(points, FirstOrderChange(), backward=True)
            return {name: mean_rows(own, power=2) for name, own in tables.items()}
        tables = context.collect(points, SquaredChange(), backward=True)
        return {name: mean_rows(own) for name, own in tables.items()}

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        if self.options.form == "gate":
            gates = sum_consumers(scores, graph, "gate")
            count = int(self.require_score(scores, f"{consumer_points(graph)[0].name}:batches"))
            importance = {name: table.square().sum(0) / count for name, table in gates.items()}
        else:
            importance = self.sum_over_layers(scores, graph, "weight")
        if self.options.blocks:  # the first producer is the stem or the projection, each other one ends a block
            importance = {g.name: importance[g.name] / max(1, len(g.producers) - 1) for g in graph.free}
        return importance

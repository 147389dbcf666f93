"""Taylor: how much the loss would change, to first order, without the channel.

Molchanov, Mallya, Tyree, Frosio, Kautz: Importance Estimation for Neural Network Pruning, CVPR 2019, section 3.
The unit of a square is the micro-batch (score.micro_batch), whose images do not depend on the number of processes.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from dist_prune.methods import method
from dist_prune.pruning.channels import Channels
from dist_prune.pruning.consumers import GateGradient, consumer_sites, flatten_tables, sum_consumers
from dist_prune.pruning.curvature import Products, Squares, means


class Options(method.RankingOptions):
    form: Literal["gate", "weight", "grouped"] = Field(
        default="gate",
        description="gate: the paper's FO-BN, one gate per channel: (scale g_scale + shift g_shift)^2 of a batch norm; "
        "weight: the sum of (g w)^2 over a filter's weights; grouped: (the sum of g w)^2",
    )
    blocks: bool = method.for_select(
        True, description="a residual stream's score is divided by the blocks that add to it, as the authors do"
    )


class Taylor(method.Ranking):
    """Coupled layers are one sum before it is squared: one gate, shared by all that consume the channel."""

    paper = "Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019"
    units = True
    Options = Options

    def score(self, bench: method.Bench) -> method.Scores:
        """``gate``: ``<layer>:in:gate`` (n, C) float64, a row per micro-batch, and ``<layer>:in:batches``;
        else: ``<layer>:weight`` (C,) float64."""
        if self.options.form == "gate":
            return flatten_tables(
                bench.observe(consumer_sites(bench.channels), GateGradient(batches=True), backward=True)
            )
        sites = [site.at_weight for site in bench.sites]
        if self.options.form == "grouped":
            found = bench.observe(sites, Products(), backward=True)
            return {name: means(tables, power=2) for name, tables in found.items()}
        return {name: means(tables) for name, tables in bench.observe(sites, Squares(), backward=True).items()}

    def worth(self, scores: Mapping[str, Tensor], channels: Channels) -> dict[str, Tensor]:
        if self.options.form == "gate":
            gates = sum_consumers(scores, channels, "gate")
            count = int(self.need(scores, f"{consumer_sites(channels)[0].name}:batches"))
            found = {name: table.square().sum(0) / count for name, table in gates.items()}
        else:
            found = self.summed(scores, channels, "weight")
        if self.options.blocks:  # the first producer is the stem or the projection, each other one ends a block
            found = {g.name: found[g.name] / max(1, len(g.producers) - 1) for g in channels.free}
        return found

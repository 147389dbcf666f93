"""Reconstruction: what the layers that read a channel lose without it, after a repair in closed form.

Least squares as in ThiNet (Luo, Wu, Lin, ICCV 2017), whose greedy choice it replaces by exact backward elimination:

    s_i = sum over readers of tr(W_i' (A_ii)^-1 W_i) / tr(W' S W),    A = (S + l I)^-1

S is the covariance of what a reader sees, W its weights. The channel of the smallest s_i goes; then W and A are
updated, so that the next one is judged with the repair of all before (pruning/repair/elimination.py). It needs
calibration images; no labels, no gradients, and one pass.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_prune.methods import base
from dist_prune.methods.needs import Needs
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
from dist_prune.pruning.hooks.consumers import ChannelPoint, consumer_points, consumers
from dist_prune.pruning.repair.elimination import Reader, backward_elimination
from dist_prune.pruning.repair.input_moments import InputMoments
from dist_prune.pruning.repair.second_moments import exact_total
from dist_prune.pruning.selection.cost import macs


class Options(base.RankingOptions):
    """Options of reconstruction.

    Attributes:
        normalise: as in ``RankingOptions``; off by default, because shares of lost variance compare as they are.
        per: the cost of a channel that its score is divided by.
        ridge: l, relative to the mean variance of what a reader sees; at least its inputs divided by the rows seen.
    """

    normalise: bool = base.select_only(
        False, description="select.scope global: division of each group's scores by their mean; off by default"
    )
    per: Literal["nothing", "macs"] = base.select_only(
        "nothing", description="divisor of a score: nothing, or the MACs of one channel of the group"
    )
    ridge: float = Field(
        default=1e-4, gt=0, le=1, description="ridge of the repair, relative to the mean variance of a reader's inputs"
    )


class Reconstruction(base.RankingMethod):
    """Channels without which the repaired layers that read them lose least go first."""

    paper = "least squares as in Luo et al., ThiNet, ICCV 2017, with backward elimination"
    Options = Options
    units = True
    needs = Needs(note="and an elimination for each group")

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Collect the second moments of all readers' inputs in one pass, and eliminate group by group.

        Returns:
            ``<group>``: (C,) float64, the share of its readers' variance that is lost when a channel goes.
        """
        points = consumer_points(context.graph)
        layers = context.graph.layers
        weights = {point.name: context.weight(point).double() for point in points}
        kernels = {name: (int(w.shape[2]), int(w.shape[3])) if w.dim() == 4 else (1, 1) for name, w in weights.items()}
        statistic = InputMoments(kernels, {point.name: layers[point.layer].positions for point in points})
        tables = context.collect(points, statistic)
        groups = {group.name: group for group in context.graph.free}

        def run(name: str) -> Tensor:
            group = groups[name]
            readers = []
            for reader in consumers(context.graph, group):
                moments = {key: exact_total(table) for key, table in tables[reader.point.name].items()}
                taps = statistic.taps(reader.point)
                readers.append(self._reader(context, reader, moments, weights[reader.point.name], taps))
            return backward_elimination(readers, group.width)

        found = context.map_jobs(list(groups), run)
        return dict(zip(groups, found, strict=True))

    def _reader(
        self,
        context: base.ScoringContext,
        reader: ChannelPoint,
        moments: Mapping[str, Tensor],
        weight: Tensor,
        taps: int,
    ) -> Reader:
        mean = moments["x"] / moments["n"]
        covariance = (moments["xx"] / moments["n"] - mean[:, None] * mean[None, :]).to(context.device)
        flat = weight.flatten(2) if weight.dim() == 4 else weight[:, :, None]  # (out, in, taps)
        if taps == 1:  # a tap of a large kernel is a set of outputs of its own
            table = flat.permute(1, 0, 2).flatten(1)
        else:
            table = flat.permute(1, 2, 0).flatten(0, 1)
        positions = reader.positions  # (C, m)
        columns = (positions[:, :, None] * taps + torch.arange(taps)).flatten(1)
        # with fewer rows than columns the sample explains any column by the others; the ridge takes that away
        ridge = max(self.options.ridge, len(covariance) / float(moments["n"]))
        return Reader(covariance, table.to(context.device), columns.to(context.device), ridge)

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        return {g.name: self.require_score(scores, g.name) / self._channel_cost(graph, g) for g in graph.free}

    def _channel_cost(self, graph: DependencyGraph, group: ChannelGroup) -> float:
        return macs(graph) - macs(graph, {group.name: group.width - 1}) if self.options.per == "macs" else 1

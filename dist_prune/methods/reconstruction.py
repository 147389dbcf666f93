"""Reconstruction: what the layers that read a channel lose without it, after a repair in closed form.

Least squares as in ThiNet (Luo, Wu, Lin, ICCV 2017), whose greedy choice it replaces by exact backward elimination:

    s_i = sum over readers of tr(W_i' (A_ii)^-1 W_i) / tr(W' S W),    A = (S + l I)^-1

S is the covariance of what a reader sees, W its weights. The channel of the smallest s_i goes; then W and A are
updated, so that the next one is judged with the repair of all before (pruning/repair/elimination.py). It needs
calibration images; no labels, no gradients, and one pass.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_prune.methods import base
from dist_prune.methods.needs import Needs
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
from dist_prune.pruning.hooks.consumers import ChannelPoint, consumer_points, consumers
from dist_prune.pruning.repair.elimination import Reader, backward_elimination
from dist_prune.pruning.repair.input_moments import MOST_COLUMNS, InputMoments
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
        "macs", description="divisor of a score: nothing, or the MACs of one channel of the group"
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

    def prunable(self, graph: DependencyGraph) -> DependencyGraph:
        """Protect positions of queries and keys, which no layer reads."""
        why = "no layer reads its channels, and this method compares what layers read"
        unread = {g.name for g in graph.free if not any(c.side == "in" for c in g.couplings)}
        groups = (replace(g, protected=why) if g.name in unread else g for g in graph.groups)
        return super().prunable(replace(graph, groups=tuple(groups)) if unread else graph)

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Collect the second moments of all readers' inputs in one pass, and eliminate group by group.

        Returns:
            ``<group>``: (C,) float64, the share of its readers' variance that is lost when a channel goes.
        """
        graph = context.graph
        points = consumer_points(graph, readers)
        weights = {point.name: context.weight(point).double() for point in points}
        windows = {p.name: window for p in points if (window := graph.layers[p.layer].window) is not None}
        statistic = InputMoments(windows, flattened_maps(graph))
        tables = context.collect(points, statistic)
        groups = {group.name: group for group in graph.free}

        def run(name: str) -> Tensor:
            group = groups[name]
            found = []
            for reader in readers(graph, group):
                moments = {key: exact_total(table) for key, table in tables[reader.point.name].items()}
                mean = moments["x"] / moments["n"]
                covariance = moments["xx"] / moments["n"] - mean[:, None] * mean[None, :]
                table, columns = _columns(reader, weights[reader.point.name], statistic)
                device = context.device
                # with fewer rows than columns the sample explains any column by the others; the ridge takes that away
                ridge = max(self.options.ridge, len(mean) / float(moments["n"]))
                found.append(Reader(covariance.to(device), table.to(device), columns.to(device), ridge))
            return backward_elimination(found, group.width)

        work = [sum(statistic.columns(r.point) ** 2 for r in readers(graph, g)) * g.width for g in groups.values()]
        results = context.map_jobs(list(groups), run, costs=work)
        return dict(zip(groups, results, strict=True))

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        return {g.name: self.require_score(scores, g.name) / self._channel_cost(graph, g) for g in graph.free}

    def _channel_cost(self, graph: DependencyGraph, group: ChannelGroup) -> float:
        return macs(graph) - macs(graph, {group.name: group.width - 1}) if self.options.per == "macs" else 1


def readers(graph: DependencyGraph, group: ChannelGroup) -> list[ChannelPoint]:
    """The consumers that mix channels: a grouped convolution whose groups are the units goes with them."""
    return [point for point in consumers(graph, group) if graph.layers[point.point.layer].groups == 1]


def flattened_maps(graph: DependencyGraph) -> dict[str, int]:
    """Hook point -> entries of a map, of wide linear layers that read the flattened maps of one group."""
    found = {}
    for group in graph.free:
        for reader in readers(graph, group):
            positions, width = reader.positions, reader.point.width
            in_order = torch.equal(positions.flatten(), torch.arange(width))
            if reader.point.kind == "linear" and width > MOST_COLUMNS and in_order and group.unit == "channel":
                found[reader.point.name] = positions.shape[1]
    return found


def _columns(reader: ChannelPoint, weight: Tensor, statistic: InputMoments) -> tuple[Tensor, Tensor]:
    """The weight as (D, O), and the columns of each channel (C, k). Taps without columns of their own are outputs."""
    taps, entries = statistic.taps(reader.point), statistic.maps.get(reader.point.name, 1)
    if entries > 1:
        flat = weight.view(len(weight), -1, entries)
        return flat.permute(1, 2, 0).flatten(1), torch.arange(flat.shape[1])[:, None]
    flat = weight.flatten(2) if weight.dim() == 4 else weight[:, :, None]  # (out, in, taps)
    table = flat.permute(1, 2, 0)
    columns = (reader.positions[:, :, None] * taps + torch.arange(taps)).flatten(1)
    return table.flatten(1) if taps == 1 else table.flatten(0, 1), columns

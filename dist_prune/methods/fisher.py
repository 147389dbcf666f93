"""Fisher pruning: how much the loss is expected to rise when a channel is switched off, per sample.

Theis, Korshunova, Tejani, Huszar: Faster gaze prediction with dense networks and Fisher pruning, 2018, equation 9:
1 / (2 N) sum_n (sum over positions of a_n dL_n / da_n)^2, for the mask of a channel where it is consumed.
"""

from collections.abc import MutableMapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_prune.methods import base
from dist_prune.pruning.graph.groups import DependencyGraph, HookPoint
from dist_prune.pruning.hooks.activations import pooled_norm
from dist_prune.pruning.hooks.consumers import ChannelPoint, consumers, flatten_maps, input_point
from dist_prune.pruning.hooks.statistics import State, Statistic

Quirk = Literal["batch_mean", "train_mode", "before_norm"]


class Options(base.QuirkOptions[Quirk], base.RankingOptions):
    """``as_released``: every quirk, the form of the Dirichlet-switch program."""

    batch: int = Field(default=100, ge=1, le=65536, description="batch_mean: images of a batch")


class Fisher(base.RankingMethod):
    """Channels whose absence changes the loss least go first; members of a coupled group add up before they are
    squared."""

    paper = "Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018"
    Options = Options

    def score(self, context: base.ScoringContext) -> base.Scores:
        """``<group>``: (C,) float64."""
        points = {group.name: consumers(context.graph, group) for group in context.graph.free}
        if self.has("before_norm"):
            points |= before_norm(context.graph)
        unique = list({point.point.name: point.point for own in points.values() for point in own}.values())
        if self.has("train_mode"):
            base.check_one_batch(context.images)
        view = train_mode() if self.has("train_mode") else {}
        found = context.collect(unique, MaskGradients(), backward=True, **view)
        scores: base.Scores = {}
        for name, own in points.items():
            width = context.graph.group(name).width
            rows = torch.zeros((context.images, width + 1), dtype=torch.float64)
            for point in own:
                rows.index_add_(1, point.slots, found[point.point.name]["rows"].double())
            rows = rows[:, :width]
            if self.has("batch_mean"):
                scores[name] = batch_mean(rows, self.options.batch)
            else:
                scores[name] = (rows**2).sum(0) / (2 * context.images)
        return scores


class MaskGradients(Statistic):
    """Sum over positions of activation times gradient, per image and position of the input: the gradient of a mask.

    State: ``rows`` (n, width).
    """

    def states(self, point: HookPoint) -> dict[str, State]:
        return {"rows": State("rows", (point.width,), torch.float32)}

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        assert grads is not None
        tables["rows"][ids] = flatten_maps((maps * grads).double(), point).sum(2).to(torch.float32)


# What the released code does otherwise (specification, part C); each is a quirk of its name.


def batch_mean(rows: Tensor, batch: int) -> Tensor:
    """The loss is a batch's mean, so its gradients carry 1 / B; half the mean square of each batch, added over
    batches."""
    parts = [part / len(part) for part in rows.split(batch)]
    return torch.stack([(part**2).mean(0) / 2 for part in parts]).sum(0)


def before_norm(graph: DependencyGraph) -> dict[str, list[ChannelPoint]]:
    """Group -> where it is scored: at the entrance of a norm that stands behind pool and activation (LeNet-5's). A norm
    behind the layer itself (VGG's) is passed first."""
    found = {}
    for group in graph.free:
        norm = pooled_norm(graph, group)
        if norm is not None:
            found[group.name] = [input_point(graph, group, norm)]
    return found


def train_mode() -> dict[str, bool]:
    """Batch norms use their batch's statistics; here that batch is all images."""
    return {"train_mode": True}

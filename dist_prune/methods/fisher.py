"""Fisher pruning: the expected rise of the loss when a channel is set to zero, from per-image gradients.

Theis, Korshunova, Tejani, Huszar: Faster gaze prediction with dense networks and Fisher pruning, 2018, equation 9:

    s_i = 1/(2 N) sum over images n of (sum over positions of a_i dL_n/da_i)^2

The inner sum is the gradient of the loss of image n with respect to a mask on the channel, where it is consumed. It
needs calibration images, their labels and gradients.
"""

from collections.abc import MutableMapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_prune.methods import base
from dist_prune.methods.needs import GRADIENTS
from dist_prune.pruning.graph.groups import DependencyGraph, HookPoint
from dist_prune.pruning.hooks.activations import pooled_norm
from dist_prune.pruning.hooks.consumers import ChannelPoint, consumers, flatten_maps, input_point
from dist_prune.pruning.hooks.statistics import State, Statistic

Quirk = Literal["batch_mean", "train_mode", "before_norm"]


class Options(base.QuirkOptions[Quirk], base.RankingOptions):
    """Options of Fisher pruning; ``as_released`` is the form in the program of the Dirichlet importance switches.

    Attributes:
        batch: images whose mean loss is differentiated at once; read with the quirk ``batch_mean``.
    """

    batch: int = Field(default=100, ge=1, le=65536, description="images per batch of the quirk batch_mean")


class Fisher(base.RankingMethod):
    """Channels whose absence changes the loss least go first.

    The mask gradients of all consumers of a channel are added before they are squared.
    """

    paper = "Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018"
    needs = GRADIENTS
    Options = Options

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Square and average the mask gradients of all images.

        Returns:
            ``<group>``: (C,) float64, expected rise of the loss in nats.

        Raises:
            PruneError: the quirk ``train_mode`` gets more images than one batch may hold.
        """
        points = {group.name: consumers(context.graph, group) for group in context.graph.free}
        if self.has("before_norm"):
            points |= before_norm(context.graph)
        unique = list({point.point.name: point.point for own in points.values() for point in own}.values())
        if self.has("train_mode"):
            base.check_one_batch(context.images)
        view = train_mode() if self.has("train_mode") else {}
        tables = context.collect(unique, MaskGradients(), backward=True, **view)
        scores: base.Scores = {}
        for name, own in points.items():
            width = context.graph.group(name).width
            rows = torch.zeros((context.images, width + 1), dtype=torch.float64)
            for point in own:
                rows.index_add_(1, point.slots, tables[point.point.name]["rows"].double())
            rows = rows[:, :width]
            if self.has("batch_mean"):
                scores[name] = batch_mean(rows, self.options.batch)
            else:
                scores[name] = (rows**2).sum(0) / (2 * context.images)
        return scores


class MaskGradients(Statistic):
    """Gradient of a mask on each input channel: the sum over positions of activation times gradient.

    State: ``rows`` (n, width) float32, per image.
    """

    def states(self, point: HookPoint) -> dict[str, State]:
        return {"rows": State("rows", (point.width,), torch.float32)}

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        assert grads is not None
        tables["rows"][ids] += flatten_maps((maps * grads).double(), point).sum(2).to(torch.float32)


# Departures of the released code; each is the quirk of its name.


def batch_mean(rows: Tensor, batch: int) -> Tensor:
    """Quirk: the loss is the mean of a batch of B images, so gradients carry a factor 1/B.

    Args:
        rows: (n, C) float64 mask gradients per image, in the order of the calibration list.
        batch: B, images per batch.

    Returns:
        (C,) float64: half the mean square over the images of a batch, added over batches.
    """
    batches = [gradients / len(gradients) for gradients in rows.split(batch)]
    return torch.stack([(gradients**2).mean(0) / 2 for gradients in batches]).sum(0)


def before_norm(graph: DependencyGraph) -> dict[str, list[ChannelPoint]]:
    """Quirk: a channel is scored before a batch norm that follows pool and activation (LeNet-5), not after it.

    A norm that follows the layer itself (VGG) comes before the mask, as everywhere.

    Args:
        graph: the dependency graph.

    Returns:
        Name of each group with such a norm -> the input of the norm.
    """
    points = {}
    for group in graph.free:
        norm = pooled_norm(graph, group)
        if norm is not None:
            points[group.name] = [input_point(graph, group, norm)]
    return points


def train_mode() -> dict[str, bool]:
    """Quirk: batch norms use the statistics of their batch, which is all images here; arguments of ``collect``."""
    return {"train_mode": True}

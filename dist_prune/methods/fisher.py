"""Fisher pruning: how much the loss is expected to rise when a channel is switched off, per sample.

Theis, Korshunova, Tejani, Huszar: Faster gaze prediction with dense networks and Fisher pruning, 2018, equation 9:
1 / (2 N) sum_n (sum over positions of a_n dL_n / da_n)^2, for the mask of a channel where it is consumed.
"""

from collections.abc import MutableMapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_prune.methods import method
from dist_prune.pruning.activations import pooled_norm
from dist_prune.pruning.channels import Channels, Site
from dist_prune.pruning.consumers import ChannelPoint, consumers, flatten_maps, input_point
from dist_prune.pruning.statistic import State, Statistic

Quirk = Literal["batch_mean", "train_mode", "before_norm"]


class Options(method.QuirkOptions[Quirk], method.RankingOptions):
    """``as_released``: every quirk, the form of the Dirichlet-switch program."""

    batch: int = Field(default=100, ge=1, le=65536, description="batch_mean: images of a batch")


class Fisher(method.Ranking):
    """Channels whose absence changes the loss least go first; members of a coupled group add up before they are
    squared."""

    paper = "Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018"
    Options = Options

    def score(self, bench: method.Bench) -> method.Scores:
        """``<group>``: (C,) float64."""
        points = {group.name: consumers(bench.channels, group) for group in bench.channels.free}
        if self.has("before_norm"):
            points |= before_norm(bench.channels)
        unique = list({point.site.name: point.site for own in points.values() for point in own}.values())
        if self.has("train_mode"):
            method.check_one_batch(bench.images)
        view = train_mode() if self.has("train_mode") else {}
        found = bench.observe(unique, MaskGradients(), backward=True, **view)
        scores: method.Scores = {}
        for name, own in points.items():
            width = bench.channels.group(name).width
            rows = torch.zeros((bench.images, width + 1), dtype=torch.float64)
            for point in own:
                rows.index_add_(1, point.slots, found[point.site.name]["rows"].double())
            rows = rows[:, :width]
            if self.has("batch_mean"):
                scores[name] = batch_mean(rows, self.options.batch)
            else:
                scores[name] = (rows**2).sum(0) / (2 * bench.images)
        return scores


class MaskGradients(Statistic):
    """Sum over positions of activation times gradient, per image and position of the input: the gradient of a mask.

    State: ``rows`` (n, width).
    """

    def states(self, site: Site) -> dict[str, State]:
        return {"rows": State("rows", (site.width,), torch.float32)}

    def update(
        self, site: Site, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        assert grads is not None
        tables["rows"][ids] = flatten_maps((maps * grads).double(), site).sum(2).to(torch.float32)


# What the released code does otherwise (specification, part C); each is a quirk of its name.


def batch_mean(rows: Tensor, batch: int) -> Tensor:
    """The loss is a batch's mean, so its gradients carry 1 / B; half the mean square of each batch, added over
    batches."""
    parts = [part / len(part) for part in rows.split(batch)]
    return torch.stack([(part**2).mean(0) / 2 for part in parts]).sum(0)


def before_norm(channels: Channels) -> dict[str, list[ChannelPoint]]:
    """Group -> where it is scored: at the entrance of a norm that stands behind pool and activation (LeNet-5's). A norm
    behind the layer itself (VGG's) is passed first."""
    found = {}
    for group in channels.free:
        norm = pooled_norm(channels, group)
        if norm is not None:
            found[group.name] = [input_point(channels, group, norm)]
    return found


def train_mode() -> dict[str, bool]:
    """Batch norms use their batch's statistics; here that batch is all images."""
    return {"train_mode": True}

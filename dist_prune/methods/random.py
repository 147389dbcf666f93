"""Random channels: the control that every criterion has to beat. Run at least three seeds."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_prune.methods import method
from dist_prune.pruning.channels import Channels


class Random(method.Ranking):
    """A seeded uniform score per channel."""

    paper = "control: uniform random scores from the recipe's seed"
    units = True
    equivariant = False

    def score(self, bench: method.Bench) -> method.Scores:
        """``<group>``: (C,) float64 in [0, 1), from (seed, group name)."""
        return {
            group.name: torch.rand(group.width, generator=bench.draw(group.name), dtype=torch.float64)
            for group in bench.channels.free
        }

    def worth(self, scores: Mapping[str, Tensor], channels: Channels) -> dict[str, Tensor]:
        return {group.name: self.need(scores, group.name) for group in channels.free}

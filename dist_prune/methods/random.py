"""Random channels: the control that every criterion has to beat. Run at least three seeds."""

import torch

from dist_prune.methods import base


class Random(base.RankingMethod):
    """A seeded uniform score per channel."""

    paper = "control: uniform random scores from the recipe's seed"
    units = True
    equivariant = False

    def score(self, context: base.ScoringContext) -> base.Scores:
        """``<group>``: (C,) float64 in [0, 1), from (seed, group name)."""
        return {
            group.name: torch.rand(group.width, generator=context.generator(group.name), dtype=torch.float64)
            for group in context.graph.free
        }

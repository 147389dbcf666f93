"""Random scores: the control that every criterion has to beat.

Scores are uniform in [0, 1), drawn from the recipe's seed and the name of the group. Run at least three seeds. It needs
no images, labels or gradients.
"""

import torch

from dist_prune.methods import base
from dist_prune.methods.needs import WEIGHTS_ALONE


class Random(base.RankingMethod):
    """One seeded uniform score per channel."""

    paper = "control: uniform random scores from the recipe's seed"
    needs = WEIGHTS_ALONE
    units = True
    equivariant = False

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Draw a score for every channel.

        Returns:
            ``<group>``: (C,) float64 in [0, 1).
        """
        return {
            group.name: torch.rand(group.width, generator=context.generator(group.name), dtype=torch.float64)
            for group in context.graph.free
        }

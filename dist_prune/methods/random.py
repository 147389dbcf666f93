"""Random channels: the control that every criterion has to beat. Run at least three seeds."""

import torch

from dist_prune.methods import method


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

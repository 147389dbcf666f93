"""FPGM: filters close to the geometric median of their layer can be replaced by the others.

He, Liu, Wang, Hu, Yang: Filter Pruning via Geometric Median, CVPR 2019, section 3. (torch-pruning raises weights to a
power before it takes distances; that is another criterion.)
"""

import torch
from pydantic import Field
from torch import Tensor

from dist_prune.methods import base


class Options(base.CoupledOptions):
    norm_rate: float = Field(
        default=1, gt=0, le=1,
        description="the mixed form: the share of filters that stays when those of small norm have gone first",
    )  # fmt: skip


class Fpgm(base.WeightRanking):
    """The sum of a filter's distances to all others; the smallest goes first."""

    paper = "He et al., Filter Pruning via Geometric Median for Deep CNN Acceleration, CVPR 2019"
    Options = Options

    def filter_scores(self, filters: Tensor) -> Tensor:
        return distance_scores(filters, self.options.norm_rate)


def distances(filters: Tensor) -> Tensor:
    """(C, D) float64 -> (C,): sum over j of the Euclidean distance to filter j."""
    squares = filters.square().sum(1)
    table = squares[:, None] + squares[None] - 2 * filters @ filters.T
    return table.fill_diagonal_(0).clamp(min=0).sqrt().sum(1)


def distance_scores(filters: Tensor, norm_rate: float) -> Tensor:
    """Distances among the filters that stay by norm; those of small norm come below them, in the order of norm."""
    order = sorted(range(len(filters)), key=lambda i: (float(filters[i].norm()), i))
    small, stay = order[: (gone := round(len(order) * (1 - norm_rate)))], sorted(order[gone:])
    out = torch.zeros(len(filters), dtype=torch.float64)
    out[stay] = distances(filters[stay])
    out[small] = out[stay].min() * torch.arange(gone, dtype=torch.float64) / max(gone, 1)
    return out

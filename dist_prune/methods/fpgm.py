"""FPGM: the sum of a filter's distances to the other filters of its layer.

He, Liu, Wang, Hu, Yang: Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration, CVPR
2019, section 3:

    s_i = sum over j of ||F_i - F_j||_2

Filters with a small sum are close to the geometric median, and the other filters can replace them. (torch-pruning
raises weights to a power before it takes distances; that is another criterion.) It needs no images, labels or
gradients.
"""

import torch
from pydantic import Field
from torch import Tensor

from dist_prune.methods import base


class Options(base.CoupledOptions):
    """Options of FPGM.

    Attributes:
        norm_rate: share of a layer's filters, by norm, that the distances are taken among. Below 1 it is the paper's
            mixed form: filters of small norm go first.
    """

    norm_rate: float = Field(
        default=1,
        gt=0,
        le=1,
        description="share of a layer's filters left after those of small norm have gone (mixed form); 1: pure form",
    )


class Fpgm(base.WeightRanking):
    """Filters close to the geometric median of their layer go first."""

    paper = "He et al., Filter Pruning via Geometric Median for Deep CNN Acceleration, CVPR 2019"
    Options = Options

    def filter_scores(self, filters: Tensor) -> Tensor:
        return distance_scores(filters, self.options.norm_rate)


def distances(filters: Tensor) -> Tensor:
    """The sum of Euclidean distances of each filter to all others.

    Args:
        filters: (C, D) float64, one flattened filter per row.

    Returns:
        (C,) float64.
    """
    squares = filters.square().sum(1)
    table = squares[:, None] + squares[None] - 2 * filters @ filters.T
    return table.fill_diagonal_(0).clamp(min=0).sqrt().sum(1)


def distance_scores(filters: Tensor, norm_rate: float) -> Tensor:
    """The score of the mixed form.

    Args:
        filters: (C, D) float64, one flattened filter per row.
        norm_rate: share of the filters that stay by norm, in (0, 1].

    Returns:
        (C,) float64: ``distances`` among the filters that stay. Those of small norm are below all of these, in the
        order of their norms.
    """
    order = sorted(range(len(filters)), key=lambda i: (float(filters[i].norm()), i))
    num_small = round(len(order) * (1 - norm_rate))
    small, stay = order[:num_small], sorted(order[num_small:])
    out = torch.zeros(len(filters), dtype=torch.float64)
    out[stay] = distances(filters[stay])
    out[small] = out[stay].min() * torch.arange(num_small, dtype=torch.float64) / max(num_small, 1)
    return out

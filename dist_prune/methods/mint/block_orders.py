"""Orders of blocks that need no images: what MINT's scores are compared with at the same rates, groups and caps."""

import torch
from torch import Tensor

from dist_prune.methods import base
from dist_prune.methods.mint.layer_pairs import LayerPair, output_of


def l1_order(context: base.ScoringContext, pairs: list[LayerPair]) -> dict[str, Tensor]:
    """Order blocks by the mean absolute weight of a block over that of its layer.

    Args:
        context: gives the weights.
        pairs: the layers whose blocks are ordered.

    Returns:
        Child layer -> (child groups, parent groups) int64, positions among all blocks; equal blocks have equal ones.
    """
    means = {}
    for pair in pairs:
        weight = context.weight(output_of(context.graph, pair.child)).double().abs()
        inputs = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
        rows = torch.stack([inputs[list(row)].mean(0) for row in pair.rows])
        blocks = torch.stack([rows[:, list(column)].mean(1) for column in pair.columns], 1)
        means[pair.child] = blocks / inputs.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return _positions(means)


def random_order(context: base.ScoringContext, pairs: list[LayerPair]) -> dict[str, Tensor]:
    """Order blocks by chance, from the recipe's seed; arguments and result as of ``l1_order``."""
    shapes = {pair.child: (len(pair.rows), len(pair.columns)) for pair in pairs}
    order = torch.randperm(sum(a * b for a, b in shapes.values()), generator=context.generator("mint", "blocks"))
    parts = order.split([a * b for a, b in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _positions(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace values of all tables by their positions among the distinct values of all of them."""
    _, order = torch.cat([value.flatten() for value in values.values()]).unique(return_inverse=True)
    parts = order.split([value.numel() for value in values.values()])
    return {name: part.view(values[name].shape) for name, part in zip(values, parts, strict=True)}


ORDERS = {"l1": l1_order, "random": random_order}

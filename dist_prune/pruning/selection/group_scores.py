"""Scores of channel groups from those of their layers, and groups that a criterion cannot score. Pure functions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph

Combine = Literal["leader", "sum", "mean"]


def reduce_group(scores: Sequence[Tensor], how: Combine) -> Tensor:
    """Reduce the scores of a group's layers to one score per channel.

    Args:
        scores: (C,) scores of each producer, the leader's first.
        how: ``leader`` takes the leader's scores as they are; ``sum`` and ``mean`` first divide the scores of each
            layer by the mean of their absolute values.

    Returns:
        (C,) float64.
    """
    scaled = torch.stack([score.double() / score.double().abs().mean().clamp(min=1e-30) for score in scores])
    return {"leader": scores[0].double(), "sum": scaled.sum(0), "mean": scaled.mean(0)}[how]


def protect(graph: DependencyGraph, reason: Callable[[ChannelGroup], str]) -> DependencyGraph:
    """Return a copy with every free group protected for which there is a reason.

    Args:
        graph: the network's dependency graph.
        reason: group -> why it has to be protected; an empty string leaves it free.
    """
    groups = (replace(group, protected=group.protected or reason(group)) for group in graph.groups)
    return replace(graph, groups=tuple(groups))

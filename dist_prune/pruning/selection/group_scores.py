"""How scores of layers become scores of channel groups, and what groups a criterion can judge. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph

Combine = Literal["leader", "sum", "mean"]


def reduce_group(parts: Sequence[Tensor], how: Combine) -> Tensor:
    """One (C,) score of a group from those of its layers, leader first; each is divided by its mean size before."""
    even = torch.stack([part.double() / part.double().abs().mean().clamp(min=1e-30) for part in parts])
    return {"leader": parts[0].double(), "sum": even.sum(0), "mean": even.mean(0)}[how]


def protect(graph: DependencyGraph, reason: Callable[[ChannelGroup], str]) -> DependencyGraph:
    """The same, with every free group protected for which there is a reason."""
    groups = (replace(group, protected=group.protected or reason(group)) for group in graph.groups)
    return replace(graph, groups=tuple(groups))

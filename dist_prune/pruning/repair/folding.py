"""Fold removed channels into the kept ones that are most like them, by their correlation at the dense network's layers.

Where a layer reads the removed channel i and the kept channel j, the best linear guess of i from j is

    x_i ~ a x_j + m_i - a m_j,    a = Cov(x_i, x_j) / Var(x_j)

So the layer's weights of j grow by a times those of i, and its bias by the sum of those of i times m_i - a m_j.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
from dist_prune.pruning.hooks.consumers import ChannelPoint, consumers
from dist_prune.pruning.repair.second_moments import exact_total


def folded_readers(graph: DependencyGraph, removed: Mapping[str, Any]) -> list[tuple[ChannelGroup, ChannelPoint]]:
    """The readers of the groups that lost channels.

    Args:
        graph: of the dense network.
        removed: group -> removed channels; empty ones are left out.
    """
    groups = [graph.group(name) for name, channels in removed.items() if channels]
    found = [(group, reader) for group in groups for reader in consumers(graph, group)]
    return [(group, reader) for group, reader in found if reader.point.side == "in"]  # no layer reads queries and keys


def fold(
    weight: Tensor, reader: ChannelPoint, removed: Sequence[int], kept_in: Sequence[int], tables: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The change of one layer that takes over one group's removed channels.

    Args:
        weight: (o, in, ...) of the dense layer, the outputs that are left.
        reader: the layer's input, and the positions of the group there.
        removed: channels of the group that are gone; one at least is left.
        kept_in: the positions of the layer's input that are left, ascending, of all groups.
        tables: ``xx``, ``x`` and ``n`` of ``InputMoments``, one column per position of the dense input.

    Returns:
        The change of the weights (1, d, o) and of the bias (1, o), float64, as ``change_layer`` takes them.
    """
    sums = {name: exact_total(table) for name, table in tables.items()}
    mean = sums["x"] / sums["n"]
    covariance = sums["xx"] / sums["n"] - mean[:, None] * mean[None, :]
    variance = covariance.diagonal().clamp_min(1e-30)
    place = {position: i for i, position in enumerate(kept_in)}
    positions, gone = reader.positions, set(removed)  # (C, m)
    kept = [channel for channel in range(reader.width) if channel not in gone]
    flat = weight.double().flatten(2) if weight.dim() == 4 else weight.double()[:, :, None]  # (o, in, taps)
    change = torch.zeros((len(flat), len(kept_in), flat.shape[2]), dtype=torch.float64, device=flat.device)
    shift = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
    for channel in removed:
        for i, candidates in zip(positions[channel].tolist(), positions[kept].T, strict=True):
            likeness = covariance[i, candidates].abs() / variance[candidates].sqrt()
            j = int(candidates[int(likeness.argmax())])
            factor = covariance[i, j] / variance[j]
            change[:, place[j]] += factor * flat[:, i]
            shift += flat[:, i].sum(1) * (mean[i] - factor * mean[j])
    return change.flatten(1).T[None], shift[None]

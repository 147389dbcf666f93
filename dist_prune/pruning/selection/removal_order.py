"""The order in which a ranking removes channels, for each range within which channels compete. Pure functions."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from dist_prune.pruning.graph.blocks import Block
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
from dist_prune.pruning.selection.tie_breaking import all_tied

Scope = Literal["local", "global", "isomorphic"]
# priority, number of the group among the free ones (behind them those of block_sets), rank within the group
Removal = tuple[float, int, int]


def removal_order(
    graph: DependencyGraph, scores: Mapping[str, Tensor], scope: Scope, normalise: bool = True, depth: bool = False
) -> list[Removal]:
    """All channels of the free groups in the order of their removal.

    With ``depth`` the residual blocks of equal structure are another group each, with the blocks as its channels: under
    ``local`` and ``isomorphic`` the share of the blocks that go is that of the channels.

    The priority is what orders channels of different groups: with ``local`` and ``isomorphic`` the share of the dense
    channels that are gone once this one is (of its group, or of all groups of its structure), with ``global`` the
    score. Groups whose scores are all equal, and equal to one another's, lose the same shares: none is emptied first.

    Args:
        graph: dependency graph of the network that is pruned.
        scores: free group -> (C,) scores; small ones go first.
        scope: the channels that compete: of one group, of all groups, or of the groups of equal structure
            (Fang et al., Isomorphic Pruning for Vision Models, ECCV 2024, section 3.2).
        normalise: divide the scores of each group by the mean of their absolute values before groups are compared.
        depth: whether blocks are removed as well; ``scores`` has (1,) by the key of each.

    Returns:
        (priority, group number, rank within the group), ascending.
    """
    blocks = _block_order(graph, scores, scope, normalise) if depth else []
    if scope == "isomorphic":
        return sorted(_isomorphic_order(graph, scores, normalise) + blocks)
    order = [(priority, 0.0, number, rank) for priority, number, rank in blocks]
    for number, group in enumerate(graph.free):
        values, tied = _scaled(scores[group.name], normalise), all_tied(scores[group.name])
        for rank, value in enumerate(values):
            share = (group.gone + rank + 1) / group.dense
            order.append((share if scope == "local" else value, share if tied else 0.0, number, rank))
    return [(priority, number, rank) for priority, _, number, rank in sorted(order)]


def structure(graph: DependencyGraph, group: ChannelGroup) -> tuple[object, ...]:
    """What two groups have in common that compete with one another under ``isomorphic``.

    The layers that change with a channel, each by its kind, its side, its kernel, whether it is depthwise or grouped,
    and the positions that a channel takes there; and the unit. Widths do not count: the groups inside the blocks of all
    stages compete.

    Args:
        graph: dependency graph of the network that is pruned.
        group: one of its groups.

    Returns:
        A hashable value, equal for groups of equal structure.
    """
    layers = []
    for (name, side), positions in group.per_channel.items():
        layer = graph.layers[name]
        per_channel = 1 if group.unit != "channel" else positions  # the positions of a head are its width
        layers.append((layer.kind, side, layer.kernel, layer.depthwise, layer.groups > 1, per_channel))
    return (group.unit, *sorted(layers))


def block_sets(graph: DependencyGraph, scores: Mapping[str, Tensor]) -> list[list[Block]]:
    """The blocks of each structure, in the order in which they would go: small scores first, of equal ones the first.

    Args:
        graph: dependency graph of the network that is pruned, with its blocks.
        scores: (1,) by the key of each block.
    """
    sets: dict[tuple[object, ...], list[Block]] = defaultdict(list)
    for block in graph.free_blocks:
        sets[block.structure].append(block)
    return [sorted(blocks, key=lambda block: float(scores[block.key])) for blocks in sets.values()]


def dense_blocks(graph: DependencyGraph, blocks: Sequence[Block]) -> int:
    """How many blocks of the structure of ``blocks`` may go from the dense network."""
    return sum(block.structure == blocks[0].structure for block in (graph.origin or graph).free_blocks)


def _block_order(graph: DependencyGraph, scores: Mapping[str, Tensor], scope: Scope, normalise: bool) -> list[Removal]:
    """All blocks in the order of their removal; the last of each structure stays."""
    order = []
    for number, blocks in enumerate(block_sets(graph, scores), start=len(graph.free)):
        dense = dense_blocks(graph, blocks)
        gone = dense - len(blocks)
        values = _scaled(torch.cat([scores[block.key].flatten() for block in blocks]), normalise)
        for rank, value in enumerate(values[:-1]):
            order.append((value if scope == "global" else (gone + rank + 1) / dense, number, rank))
    return order


def _scaled(scores: Tensor, normalise: bool) -> list[float]:
    """The scores, ascending, divided by the mean of their absolute values."""
    values = sorted(map(float, scores))
    mean = (sum(map(abs, values)) / len(values) or 1.0) if normalise else 1.0
    return [value / mean for value in values]


def _isomorphic_order(graph: DependencyGraph, scores: Mapping[str, Tensor], normalise: bool) -> list[Removal]:
    """Rank the channels of each set of equal groups together, then take the same share of every set."""
    sets: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for number, group in enumerate(graph.free):
        sets[structure(graph, group)].append(number)
    order = []
    for numbers in sets.values():
        groups = [graph.free[number] for number in numbers]
        gone, dense = sum(group.gone for group in groups), sum(group.dense for group in groups)
        ranked = []
        for number, group in zip(numbers, groups, strict=True):
            tied = all_tied(scores[group.name])
            for rank, value in enumerate(_scaled(scores[group.name], normalise)):
                ranked.append((value, (group.gone + rank + 1) / group.dense if tied else 0.0, number, rank))
        order += [((gone + i + 1) / dense, number, rank) for i, (_, _, number, rank) in enumerate(sorted(ranked))]
    return sorted(order)

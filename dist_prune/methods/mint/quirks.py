"""Departures of MINT's released program from its mathematics; each function bears the name of its quirk."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dist_prune.methods.mint import spanning_tree
from dist_prune.pruning.graph.groups import DependencyGraph, Layer


def independent_samples(take: Callable[[str], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Read parents and children on images drawn independently of each other; the joint law is lost."""
    return take("parents"), take("children")


def with_replacement(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Draw ``wanted`` positions below ``count``, (wanted,) int64; an image may be drawn again."""
    return torch.randint(count, (wanted,), generator=generator)


def duplicates_unconnected(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the tree of a sparse matrix, in which distance 0 is no edge; see ``minimum_spanning_tree``."""
    return spanning_tree.minimum_spanning_tree(a, b, False)


def swapped_neighbour(table: np.ndarray) -> np.ndarray:
    """Take the neighbour in A of each row of B as if it were a row of B: (|A|, |B|) distances -> (|A|,) int64."""
    return spanning_tree.nearest(np.ascontiguousarray(table.T))[: len(table)]


def edge_numbers(joined: np.ndarray, first: int) -> int:
    """Count cross edges with an edge's number in place of its row; edges are in order of (row, column), row < column.

    SciPy keeps one of the two equal entries of the symmetric matrix, by its sort. Here it is the upper one.
    """
    ends = np.stack([np.arange(len(joined)), joined], 1)[joined >= 0]
    ends.sort(1)
    columns = ends[np.lexsort((ends[:, 1], ends[:, 0])), 1]
    return int(((np.arange(len(columns)) < first) != (columns < first)).sum())


def clamped_score(edges: Tensor, first: int) -> Tensor:
    """Limit R to |C| (``first``), so that no score is below about 0."""
    return edges.clamp(max=first)


def numbered_parents(graph: DependencyGraph, layer: Layer) -> str | None:
    """Name the layer numbered before the child as its parent, whatever feeds it; None if that one is too narrow."""
    names = [name for name, other in graph.layers.items() if other.kind in ("conv", "linear")]
    before = names.index(layer.name) - 1
    return names[before] if before >= 0 and graph.layers[names[before]].width_out >= layer.width_in else None


def distinct_cap(values: np.ndarray, weights: np.ndarray, cap: float, limit: int) -> int:
    """Apply the cap to distinct values: entry round(cap U) of the pair's own U distinct values.

    It applies if ``cap`` of the blocks or more would be cut. Arguments as of ``capped_threshold``.
    """
    if (values <= limit).mean() < cap:
        return limit
    distinct = np.unique(values)
    return int(distinct[min(round(cap * len(distinct)), len(distinct) - 1)])

"""Conditional geometric mutual information from nearest neighbours and spanning trees (Yasaei Sekeh and Hero 2019).

I(X; Y | Z) = 1 - R (|C| + |A|) / (2 |C| |A|), where R counts the edges of the minimum spanning tree of two pooled
samples that lead from one to the other: rows (X, Y, Z) as they are (C), and rows (A) whose Y comes from the row of a
third sample (B) with the nearest Z, as if X and Y knew of each other only through Z. Rows are images.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.methods.mint import spanning_tree
from dist_prune.pruning.plan.weight_blocks import Indices

Donors = Callable[[np.ndarray], np.ndarray]  # (|A|, |B|) squared distances of Z -> (|A|,) row of B for each of A
Tree = Callable[[np.ndarray, np.ndarray], np.ndarray]  # two tables to be added -> neighbour of each point
Count = Callable[[np.ndarray, int], int]  # the tree, |C| -> R


@dataclass(frozen=True)
class CmiVariant:
    """The three steps that a released program may do otherwise."""

    donors: Donors = spanning_tree.nearest
    tree: Tree = spanning_tree.minimum_spanning_tree
    count: Count = spanning_tree.cross_edges


@dataclass
class ConditionalDependence:
    """R for groups of a child layer's channels against groups of its parent's, given the parent's other channels.

    Attributes:
        child, parent: (n, channels) float64 activations, the same images in the same (random) order.
        child_groups, parent_groups: columns of X and of Y.
        threads: at work on trees at the same time; the result does not depend on it.
    """

    child: np.ndarray
    parent: np.ndarray
    child_groups: Sequence[Indices]
    parent_groups: Sequence[Indices]
    estimator: CmiVariant = CmiVariant()
    threads: int = 1

    def __post_init__(self):
        n = len(self.parent)
        c, a = split_sizes(n)
        self.a, self.b, self.c = np.arange(a), np.arange(a, n - c), np.arange(n - c, n)
        self.pool = np.concatenate([self.c, self.a])  # C first: points below |C| are C's
        self.child = np.ascontiguousarray(self.child[self.pool])

    def cross_edges(self, groups: Sequence[int]) -> np.ndarray:
        """(child groups, len(groups)) int64: R against these parent groups; their tables are in memory together."""
        tables = [self.parent_table(group) for group in groups]

        def row(number: int) -> list[int]:
            mine = spanning_tree.small_distance_table(np.ascontiguousarray(self.child[:, self.child_groups[number]]))
            trees = (self.estimator.tree(mine, table) for table in tables)
            return [self.estimator.count(tree, len(self.c)) for tree in trees]

        with ThreadPoolExecutor(self.threads) as pool:
            return np.array(list(pool.map(row, range(len(self.child_groups)))), np.int64)

    def parent_table(self, group: int) -> np.ndarray:
        """(N, N) float32 squared distances of the pooled parent rows, those of A with their donors' Y."""
        y = self.parent[:, self.parent_groups[group]]
        new = np.concatenate([y[self.c], y[self.b][self._donors(y)]])
        return spanning_tree.replace_coordinates(
            self._pooled, np.ascontiguousarray(y[self.pool]), np.ascontiguousarray(new)
        )

    def _donors(self, y: np.ndarray) -> np.ndarray:
        if y.shape[1] == self.parent.shape[1]:  # there is no Z: any row will do, and B is in random order
            return self.a
        of_y = spanning_tree.squared_distances(np.ascontiguousarray(y[self.a]), np.ascontiguousarray(y[self.b]))
        return self.estimator.donors(self._across - of_y)

    @cached_property
    def _pooled(self) -> np.ndarray:
        rows = np.ascontiguousarray(self.parent[self.pool])
        return spanning_tree.squared_distances(rows, rows)

    @cached_property
    def _across(self) -> np.ndarray:
        a, b = (np.ascontiguousarray(self.parent[rows]) for rows in (self.a, self.b))
        return spanning_tree.squared_distances(a, b)


def split_sizes(images: int) -> tuple[int, int]:
    """|C| and |A| of so many rows: about a third each."""
    two_thirds = 2 * images // 3
    return images - two_thirds, two_thirds // 2


def tile_size(points: int, groups: int, budget: int) -> int:
    """How many parent groups are worked on together: within ``budget`` bytes, and so that 8 ranks have work.

    The same on every rank, whatever its threads: the jobs are made of it.
    """
    return min(_room(points, budget), max(1, -(-groups // 8)))


def worker_count(points: int, threads: int, budget: int) -> int:
    """How many of ``threads`` may hold a child table each beside a tile of parent tables."""
    return min(_room(points, budget), threads)


def _room(points: int, budget: int) -> int:
    """Half of the float32 tables that fit beside the float64 one and what it is made of; at least one."""
    return max(1, (budget // (4 * points**2) - 4) // 2)


def mutual_information(edges: Tensor, parts: Tensor) -> Tensor:
    """I of R, float64; ``parts`` (2,) is |C| and |A|."""
    first, second = parts.tolist()
    return 1 - edges.double() * (first + second) / (2 * first * second)


Draw = Callable[[int, int, torch.Generator], Tensor]  # images of a class, how many, generator -> places among them


def sample_images(labels: Tensor, per_class: int | None, draw: Draw, generator: torch.Generator) -> np.ndarray:
    """Positions of images: of every class ``per_class`` (None: as many as there are), then in random order."""
    found = []
    for label in labels.unique().tolist():
        places = (labels == label).nonzero().flatten()
        found.append(places[draw(len(places), per_class or len(places), generator)])
    together = torch.cat(found)
    return together[torch.randperm(len(together), generator=generator)].numpy()


def without_replacement(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Each image at most once."""
    if wanted > count:
        raise PruneError(
            f"method.samples_per_class: {wanted}, but a class has only {count} among the calibration images; raise "
            "score.images"
        )
    return torch.randperm(count, generator=generator)[:wanted]


def same_samples(take: Callable[[str], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Parents and children are read on the same images."""
    both = take("images")
    return both, both

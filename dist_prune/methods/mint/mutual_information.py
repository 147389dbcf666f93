"""Conditional geometric mutual information from nearest neighbours and minimum spanning trees.

Yasaei Sekeh, Hero: Geometric estimation of multivariate dependency, Entropy 2019; Ganesh et al., MINT, ICPR 2020.
With the law f of (X, Y, Z) and the law h with which X and Y depend on each other through Z alone, the quantity is
I(X; Y | Z) = 1 - 2 integral f h / (f + h), between 0 (independent given Z) and 1.

Its estimate splits the images, which are the rows, in thirds A, B and C. C keeps its rows (X, Y, Z), a sample of f. In
A each Y is replaced by that of the row of B with the nearest Z, a sample of h. R is the number of edges between rows of
C and rows of A in the minimum spanning tree of both together (the Friedman-Rafsky statistic), and
I = 1 - R (|C| + |A|) / (2 |C| |A|).
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
Draw = Callable[[int, int, torch.Generator], Tensor]  # images of a class, number, generator -> positions among them


@dataclass(frozen=True)
class CmiVariant:
    """The three steps of the estimate in which the released program departs.

    Attributes:
        donors: (|A|, |B|) squared distances of Z -> (|A|,) row of B whose Y each row of A gets.
        tree: two (N, N) tables of squared distances that are added -> (N,) neighbour of each point in the tree.
        count: (the tree, |C|) -> R.
    """

    donors: Donors = spanning_tree.nearest
    tree: Tree = spanning_tree.minimum_spanning_tree
    count: Count = spanning_tree.cross_edges


@dataclass
class ConditionalDependence:
    """R for groups of a child layer's channels and groups of its parent's, given the parent's other channels.

    Attributes:
        child: (n, child channels) float64 activations of n images in random order.
        parent: (n, parent channels) float64 activations, of the same images in the same order.
        child_groups: columns of ``child`` that are X, for each group.
        parent_groups: columns of ``parent`` that are Y, for each group; its other columns are Z.
        estimator: the steps of the estimate.
        threads: number of threads that compute trees; the result does not depend on it.
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
        self.a = np.arange(a)
        self.b = np.arange(a, n - c)
        self.c = np.arange(n - c, n)
        self.pool = np.concatenate([self.c, self.a])  # C first: points below |C| are C's
        self.child = np.ascontiguousarray(self.child[self.pool])

    def cross_edges(self, groups: Sequence[int]) -> np.ndarray:
        """Compute R for these parent groups, whose tables are in memory together: (child groups, len(groups)) int64."""
        tables = [self.parent_table(group) for group in groups]

        def row(number: int) -> list[int]:
            x = spanning_tree.small_distance_table(np.ascontiguousarray(self.child[:, self.child_groups[number]]))
            trees = (self.estimator.tree(x, table) for table in tables)
            return [self.estimator.count(tree, len(self.c)) for tree in trees]

        with ThreadPoolExecutor(self.threads) as pool:
            return np.array(list(pool.map(row, range(len(self.child_groups)))), np.int64)

    def parent_table(self, group: int) -> np.ndarray:
        """Compute (N, N) float32 squared distances of the N pooled parent rows, those of A with their donors' Y."""
        y = self.parent[:, self.parent_groups[group]]
        new = np.concatenate([y[self.c], y[self.b][self._donors(y)]])
        return spanning_tree.replace_coordinates(
            self._pooled, np.ascontiguousarray(y[self.pool]), np.ascontiguousarray(new)
        )

    def _donors(self, y: np.ndarray) -> np.ndarray:
        if y.shape[1] == self.parent.shape[1]:  # there is no Z: every row is a donor, and B is in random order
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
    """Divide the images: |C| and |A|, about a third each; the others are B."""
    two_thirds = 2 * images // 3
    return images - two_thirds, two_thirds // 2


def tile_size(points: int, groups: int, budget: int) -> int:
    """Compute how many parent groups make one job: within ``budget`` bytes, and with jobs for 8 ranks.

    It is the same on every rank and does not depend on threads, because the jobs are formed by it.

    Args:
        points: N, the rows pooled in a tree.
        groups: number of parent groups.
        budget: memory for the tables, in bytes.
    """
    return min(_tables_that_fit(points, budget), max(1, -(-groups // 8)))


def worker_count(points: int, threads: int, budget: int) -> int:
    """Compute how many of ``threads`` may hold a child table each, beside the parent tables; see ``tile_size``."""
    return min(_tables_that_fit(points, budget), threads)


def _tables_that_fit(points: int, budget: int) -> int:
    """Half of the float32 tables that fit beside the float64 table and its temporary copy; at least one."""
    return max(1, (budget // (4 * points**2) - 4) // 2)


def mutual_information(edges: Tensor, parts: Tensor) -> Tensor:
    """Compute I = 1 - R (|C| + |A|) / (2 |C| |A|), float64.

    Args:
        edges: R, int64 of any shape.
        parts: (2,) int64, |C| and |A|.
    """
    first, second = parts.tolist()
    return 1 - edges.double() * (first + second) / (2 * first * second)


def sample_images(labels: Tensor, per_class: int | None, draw: Draw, generator: torch.Generator) -> np.ndarray:
    """Draw positions of images, (n,) int64: the same number from every class, then all in random order.

    Args:
        labels: (images,) int64 classes.
        per_class: number of images of each class; None: all there are.
        draw: (images of the class, number, generator) -> (number,) int64 positions among them.
        generator: on the CPU.
    """
    chosen = []
    for label in labels.unique().tolist():
        positions = (labels == label).nonzero().flatten()
        chosen.append(positions[draw(len(positions), per_class or len(positions), generator)])
    sample = torch.cat(chosen)
    return sample[torch.randperm(len(sample), generator=generator)].numpy()


def without_replacement(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Draw ``wanted`` positions below ``count``, (wanted,) int64, each at most once.

    Raises:
        PruneError: more are wanted than there are.
    """
    if wanted > count:
        raise PruneError(
            f"method.samples_per_class: {wanted}, but a class has only {count} among the calibration images; raise "
            "score.images"
        )
    return torch.randperm(count, generator=generator)[:wanted]


def same_samples(take: Callable[[str], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Read parents and children on the same images.

    Args:
        take: name of a draw -> (n,) positions of images.
    """
    both = take("images")
    return both, both

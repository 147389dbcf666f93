"""Spanning trees against SciPy's; the estimator against what it estimates."""

import numpy as np
import pytest
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from dist_prune.methods.mint import mutual_information, quirks, spanning_tree
from dist_prune.methods.mint.mutual_information import CmiVariant, ConditionalDependence


def normal(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def edges_of(joined: np.ndarray) -> set[tuple[int, int]]:
    return {(min(i, int(j)), max(i, int(j))) for i, j in enumerate(joined) if j >= 0}


def scipy_tree(points: np.ndarray) -> set[tuple[int, int]]:
    found = minimum_spanning_tree(cdist(points, points)).tocoo()
    return {(min(i, j), max(i, j)) for i, j in zip(found.row.tolist(), found.col.tolist(), strict=True)}


@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 2), (40, 3), (257, 2), (300, 50), (513, 7)])
def test_trees_are_scipy_s(n, d):
    points = normal(n, d, n)
    a, b = points[:, : d // 2], points[:, d // 2 :]
    joined = spanning_tree.minimum_spanning_tree(
        *(spanning_tree.small_distance_table(np.ascontiguousarray(part)) for part in (a, b))
    )
    assert edges_of(joined) == scipy_tree(points)
    first = n // 3
    wanted = sum((i < first) != (j < first) for i, j in scipy_tree(points))
    assert spanning_tree.cross_edges(joined, first) == wanted


def test_distances_are_cdist_s_and_do_not_lose_near_duplicates():
    x, y = 1e4 + normal(300, 700, 0), 1e4 + normal(200, 700, 1)
    y[7] = x[5] + 1e-9
    found = spanning_tree.squared_distances(x, y)
    assert np.allclose(found, cdist(x, y, "sqeuclidean"), rtol=1e-12)
    assert found[5, 7] == pytest.approx(((y[7] - x[5]) ** 2).sum(), rel=1e-9)
    old, new = x[:, :3].copy(), normal(300, 3, 2)
    swapped = np.concatenate([new, x[:, 3:]], 1)
    table = spanning_tree.replace_coordinates(spanning_tree.squared_distances(x, x), old, new)
    assert np.allclose(table, cdist(swapped, swapped, "sqeuclidean"), rtol=1e-6)


def test_ties_fall_to_the_smaller_point_and_duplicates_can_be_left_apart():
    square = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    table, nothing = spanning_tree.small_distance_table(square), np.zeros((4, 4), np.float32)
    assert edges_of(spanning_tree.minimum_spanning_tree(table, nothing)) == {(0, 1), (0, 2), (1, 3)}
    twins = spanning_tree.small_distance_table(np.array([[0.0], [0.0], [2.0]]))
    assert edges_of(spanning_tree.minimum_spanning_tree(twins, np.zeros_like(twins))) == {(0, 1), (0, 2)}
    assert edges_of(quirks.duplicates_unconnected(twins, np.zeros_like(twins))) == {(0, 2), (1, 2)}
    same = spanning_tree.small_distance_table(np.zeros((3, 1)))
    assert edges_of(quirks.duplicates_unconnected(same, np.zeros_like(same))) == set()


def reference(x: np.ndarray, y: np.ndarray, z: np.ndarray, released: bool) -> int:
    """R by the specification's steps, on SciPy; as released: swapped neighbours, an edge's number for its row."""
    n = len(x)
    two = 2 * n // 3
    half = two // 2
    a, b, c = slice(0, half), slice(half, two), slice(two, n)
    donors = cKDTree(z[a]).query(z[b])[1][:half] if released else cKDTree(z[b]).query(z[a])[1]
    pool = np.concatenate([np.hstack([x[c], y[c], z[c]]), np.hstack([x[a], y[b][donors], z[a]])])
    found = minimum_spanning_tree(np.triu(cdist(pool, pool))).tocsr()
    first = n - two
    if released:
        return sum((i < first) != (int(j) < first) for i, j in enumerate(found.indices))
    rows = np.repeat(np.arange(found.shape[0]), np.diff(found.indptr))
    return int(((rows < first) != (found.indices < first)).sum())


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_r_of_a_pair_is_the_specification_s(released, seed):
    """All groups of a pair through the shared tables, against SciPy on each group's own rows."""
    parent = normal(200, 12, seed)
    child = 0.5 * parent[:, :6] + normal(200, 6, 100 + seed)
    x, y = [(0, 1, 2), (3, 4, 5)], [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)]
    steps = (
        CmiVariant(quirks.swapped_neighbour, spanning_tree.minimum_spanning_tree, quirks.edge_numbers)
        if released
        else CmiVariant()
    )
    found = ConditionalDependence(child, parent, x, y, steps, threads=2).cross_edges(range(4))
    for i, group in enumerate(x):
        for j, other in enumerate(y):
            rest = [k for k in range(12) if k not in other]
            assert found[i, j] == reference(child[:, group], parent[:, other], parent[:, rest], released)


def score(n: int, dependence: float, seed: int) -> float:
    """I(X; Y | Z) where Y = X + noise, next to an independent Z."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    y = dependence * x + np.sqrt(1 - dependence**2) * rng.normal(size=(n, 2))
    parent = np.hstack([y, rng.normal(size=(n, 1))])
    work = ConditionalDependence(x, parent, [(0, 1)], [(0, 1), (2,)])
    c, a = mutual_information.split_sizes(n)
    return 1 - int(work.cross_edges([0])[0, 0]) * (c + a) / (2 * c * a)


def test_independence_scores_zero_and_dependence_scores_more():
    means = [np.mean([score(600, how, seed) for seed in range(6)]) for how in (0.0, 0.7, 0.9, 0.99, 0.999)]
    assert abs(means[0]) < 0.1
    assert means == sorted(means)
    assert means[-1] > 0.5


def test_a_pair_without_other_channels_needs_no_neighbour():
    parent = normal(90, 2, 0)
    work = ConditionalDependence(parent + 0.01 * normal(90, 2, 1), parent, [(0, 1)], [(0, 1)])
    c, a = mutual_information.split_sizes(90)
    assert 1 - int(work.cross_edges([0])[0, 0]) * (c + a) / (2 * c * a) > 0.4


def test_tiles_and_threads_fit_their_budget():
    points, table = 4000, 4 * 4000**2
    for budget in (2**28, 2**30, 2**33):
        count, threads = (
            mutual_information.tile_size(points, 64, budget),
            mutual_information.worker_count(points, 16, budget),
        )
        assert 1 <= count <= 8
        assert 1 <= threads <= 16
        assert count == threads == 1 or (count + threads + 4) * table <= budget
    assert mutual_information.tile_size(points, 64, 2**33) == 8

"""Minimum spanning trees of point clouds whose squared distances are a sum of two tables: D = A + B.

Every value is computed in one fixed order, so the trees do not depend on threads, tiles or ranks. N is the number of
points, d that of coordinates.
"""

import numpy as np
from numba import njit

_CACHE = 2**17  # float64 coordinates of a tile: a megabyte


@njit(nogil=True, cache=True)
def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compute squared distances: (n, d) and (m, d) float64 -> (n, m) float64.

    Coordinates are added in their order. The Gram form is not used: it loses the digits of near-duplicates.
    """
    out = np.zeros((len(x), len(y)), np.float64)
    turned = y.T.copy()
    tile = max(256, _CACHE // max(x.shape[1], 1))
    for start in range(0, len(y), tile):
        stop = min(start + tile, len(y))
        for i in range(len(x)):
            sums = out[i, start:stop]
            for d in range(x.shape[1]):
                _add_squares(sums, turned[d, start:stop], x[i, d], 1.0)
    return out


@njit(nogil=True, cache=True)
def replace_coordinates(table: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Update squared distances after some coordinates of the points changed.

    Args:
        table: (N, N) float64 squared distances before the change.
        old: (N, d) float64, the coordinates that change.
        new: (N, d) float64, their new values.

    Returns:
        (N, N) float32; a value that rounding made negative is 0.
    """
    out = np.empty(table.shape, np.float32)
    turned_old, turned_new = old.T.copy(), new.T.copy()
    for i in range(len(table)):
        row = table[i].copy()
        for d in range(old.shape[1]):
            _add_squares(row, turned_old[d], old[i, d], -1.0)
        for d in range(new.shape[1]):
            _add_squares(row, turned_new[d], new[i, d], 1.0)
        for j in range(len(row)):
            out[i, j] = max(row[j], 0.0)
    return out


@njit(nogil=True, cache=True)
def small_distance_table(x: np.ndarray) -> np.ndarray:
    """Compute squared distances of points with few coordinates: (N, d) float64 -> (N, N) float32."""
    out = np.empty((len(x), len(x)), np.float32)
    turned = x.T.copy()
    for i in range(len(x)):
        row = np.zeros(len(x), np.float64)
        for d in range(x.shape[1]):
            _add_squares(row, turned[d], x[i, d], 1.0)
        for j in range(len(row)):
            out[i, j] = row[j]
    return out


@njit(nogil=True, inline="always")
def _add_squares(sums: np.ndarray, others: np.ndarray, at: float, sign: float) -> None:
    for j in range(len(sums)):
        sums[j] += sign * (others[j] - at) ** 2


@njit(nogil=True, cache=True)
def nearest(table: np.ndarray) -> np.ndarray:
    """Find the nearest column of each row, the first of equals: (n, m) distances -> (n,) int64."""
    out = np.zeros(len(table), np.int64)
    for i in range(len(table)):
        for j in range(1, table.shape[1]):
            if table[i, j] < table[i, out[i]]:
                out[i] = j
    return out


@njit(nogil=True, cache=True)
def minimum_spanning_tree(a: np.ndarray, b: np.ndarray, zero_is_an_edge: bool = True) -> np.ndarray:
    """Compute the minimum spanning tree of the complete graph with squared distances ``a + b``, by Prim's algorithm.

    Among equal distances the point with the smaller index joins first. Squares order edges as the distances do.

    Args:
        a: (N, N) float32, not negative.
        b: (N, N) float32, not negative.
        zero_is_an_edge: False leaves pairs at distance 0 unconnected, as sparse matrices do.

    Returns:
        (N,) int64, the neighbour through which each point joined; -1 for point 0 (and other roots of a forest).
    """
    n = len(a)
    row = np.empty(n, np.float32)
    bits = row.view(np.int32)  # floats that are not negative are ordered as their bits are: integers compare faster
    infinite = np.array([np.inf], np.float32).view(np.int32)[0]
    best = np.full(n, infinite, np.int32)
    joined = np.full(n, -1, np.int64)
    through = np.full(n, -1, np.int32)
    best[0] = -1  # in the tree: less than any distance for the update, more than any as an unsigned number
    at = np.int32(0)
    for _ in range(n - 1):
        for j in range(n):
            row[j] = a[at, j] + b[at, j]
        if not zero_is_an_edge:
            for j in range(n):
                if row[j] == 0:
                    row[j] = np.inf
        least = np.uint32(0xFFFFFFFF)
        for j in range(n):
            closer = bits[j] < best[j]
            new = bits[j] if closer else best[j]
            through[j] = at if closer else through[j]
            best[j] = new
            least = min(least, np.uint32(new))
        wanted = np.int32(least)
        for j in range(n):
            if best[j] == wanted:
                at = np.int32(j)
                break
        joined[at] = through[at] if wanted != infinite else -1
        best[at] = -1
    return joined


@njit(nogil=True, cache=True)
def cross_edges(joined: np.ndarray, first: int) -> int:
    """Count the edges of a tree between points below ``first`` and the others: the Friedman-Rafsky statistic.

    Args:
        joined: (N,) int64, the neighbour through which each point joined; -1 for roots.
        first: size of the first sample; its points come first.
    """
    count = 0
    for i in range(len(joined)):
        if joined[i] >= 0 and (i < first) != (joined[i] < first):
            count += 1
    return count

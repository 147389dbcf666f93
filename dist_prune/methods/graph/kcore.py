"""The k-core decomposition that thins out redundancy graphs, and connected components.

Graphs are (C, C) symmetric bool adjacency matrices with a diagonal of False; 2,048 nodes take tens of milliseconds.
"""

import numpy as np


def decompose(adjacency: np.ndarray, importance: np.ndarray) -> list[int]:
    """Thin a redundancy graph out until no edge is left.

    Each step finds the innermost k-core, keeps the most important node of each of its connected components, and removes
    the other nodes of the core.

    Args:
        adjacency: (C, C) bool.
        importance: (C,) numbers; of equal nodes the smaller index is kept.

    Returns:
        The nodes that are kept, ascending; at least one if C > 0.

    Source: Li et al., Neurocomputing 2024 (redundancy graph decomposition).
    """
    alive = np.ones(len(importance), dtype=bool)
    while True:
        cores = coreness(adjacency, alive)
        if cores.max(initial=0) == 0:
            return np.flatnonzero(alive).tolist()
        core = cores == cores.max()
        while core.any():
            component = _first_component(adjacency, core)
            core &= ~component
            members = np.flatnonzero(component)
            component[members[np.argmax(importance[members])]] = False
            alive &= ~component


def coreness(adjacency: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """The coreness of every node: the largest k for which it lies in the k-core.

    Args:
        adjacency: (C, C) bool.
        alive: (C,) bool, the nodes of the graph.

    Returns:
        (C,) int64; 0 for nodes outside ``alive``.
    """
    remaining = alive.copy()
    degree = np.where(remaining, adjacency[:, remaining].sum(1), 0)
    cores = np.zeros(len(remaining), dtype=np.int64)
    k = 0
    while remaining.any():
        k = max(k, int(degree[remaining].min()))
        peel = remaining & (degree <= k)
        cores[peel] = k
        remaining &= ~peel
        degree = degree - adjacency[peel].sum(0)
    return cores


def connected_components(adjacency: np.ndarray) -> np.ndarray:
    """The connected component of every node that has an edge.

    Args:
        adjacency: (C, C) bool.

    Returns:
        (C,) int64 number of the component, 0 for the largest; -1 for nodes without an edge.
    """
    components = []
    remaining = adjacency.sum(1) > 0
    while remaining.any():
        component = _first_component(adjacency, remaining)
        remaining &= ~component
        components.append(component)
    labels = np.full(len(adjacency), -1)
    for number, component in enumerate(sorted(components, key=lambda component: -int(component.sum()))):
        labels[component] = number
    return labels


def _first_component(adjacency: np.ndarray, within: np.ndarray) -> np.ndarray:
    """(C,) bool: the connected component of ``within`` that contains its first node."""
    component = np.zeros_like(within)
    component[np.argmax(within)] = True
    frontier = component
    while frontier.any():
        frontier = adjacency[frontier].any(0) & within & ~component
        component |= frontier
    return component

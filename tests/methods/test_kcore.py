"""Cores and parts of graphs."""

import networkx
import numpy as np

from dist_prune.methods.graph.kcore import connected_components, coreness, decompose


def random_graph(nodes: int, chance: float, seed: int = 0) -> np.ndarray:
    table = np.triu(np.random.default_rng(seed).random((nodes, nodes)) < chance, 1)
    return table | table.T


def test_coreness_is_networkx_s():
    for chance in (0.02, 0.1, 0.4):
        table = random_graph(60, chance)
        expected = networkx.core_number(networkx.from_numpy_array(table))
        assert coreness(table, np.ones(60, dtype=bool)).tolist() == [expected[i] for i in range(60)]


def test_parts_are_networkx_s_by_size():
    table = random_graph(80, 0.015)
    labels = connected_components(table)
    found = sorted(map(len, networkx.connected_components(networkx.from_numpy_array(table))), reverse=True)
    assert [int((labels == n).sum()) for n in range(labels.max() + 1)] == [size for size in found if size > 1]
    assert int((labels < 0).sum()) == found.count(1)
    assert all(len(set(labels[np.flatnonzero(row)])) == 1 for row in table if row.any())


def slow_decompose(table: np.ndarray, worth: np.ndarray) -> list[int]:
    """The paper's loop, word by word, on networkx."""
    graph = networkx.from_numpy_array(table)
    while graph.number_of_edges():
        core = networkx.core_number(graph)
        inner = graph.subgraph([node for node, k in core.items() if k == max(core.values())])
        for part in list(networkx.connected_components(inner)):
            best = min(part, key=lambda node: (-worth[node], node))
            graph.remove_nodes_from(part - {best})
    return sorted(graph.nodes)


def test_decomposition_is_the_paper_s_loop():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        table = random_graph(int(rng.integers(2, 40)), rng.choice([0.03, 0.1, 0.3, 0.8]), seed)
        worth = rng.integers(0, 5, len(table)).astype(float)  # with ties
        assert decompose(table, worth) == slow_decompose(table, worth)


def test_large_dense_graph():
    """2,048 filters: what stays has no edge left among it (benchmarks/graph.py has the time)."""
    for chance in (0.3, 0.002):
        table = random_graph(2048, chance)
        kept = decompose(table, np.random.default_rng(1).random(2048))
        assert kept
        assert not table[np.ix_(kept, kept)].any()

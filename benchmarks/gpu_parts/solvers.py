"""Would a GPU form of two CPU solvers pay? Batched eigenvalues of Gram matrices, and Borůvka's spanning tree."""

import statistics
from collections.abc import Collection, Iterator

import numpy as np
import torch

from benchmarks.gpu_parts.common import Row, in_turns
from dist_prune.methods.mint import spanning_tree

WORTH = 3.0


def boruvka(table: torch.Tensor) -> float:
    """Total length of the minimum spanning tree of (N, N) squared distances, on the table's device."""
    n = len(table)
    lengths = table.double()
    lengths.fill_diagonal_(torch.inf)
    group = torch.arange(n, device=table.device)
    total = torch.zeros((), dtype=torch.float64, device=table.device)
    while True:
        apart = torch.where(group[:, None] == group[None, :], torch.inf, lengths)
        near, to = apart.min(1)
        best = torch.full((n,), torch.inf, dtype=torch.float64, device=table.device)
        best.scatter_reduce_(0, group, near, "amin")
        leads = (near == best[group]) & near.isfinite()
        source = torch.full((n,), n, device=table.device)
        source.scatter_reduce_(0, group[leads], torch.arange(n, device=table.device)[leads], "amin")
        heads = source[source < n]
        if not len(heads):
            return float(total)
        one, other = group[heads], group[to[heads]]
        mutual = torch.zeros(n, dtype=torch.int64, device=table.device) - 1
        mutual[one] = other
        keep = ~((mutual[other] == one) & (one > other))  # an edge that two groups chose counts once
        total += near[heads][keep].sqrt().sum()
        parent = torch.arange(n, device=table.device)
        parent[one[keep]] = other[keep]
        for _ in range(n.bit_length() + 1):
            parent = parent[parent]
        group = parent[group]
        if len(group.unique()) == 1:
            return float(total)


def rows(device: torch.device, seconds: float, done: Collection[str] = ()) -> Iterator[Row]:
    """CPU and device in turns; a form on the device is worth writing from three times the speed on."""
    draw = torch.Generator().manual_seed(0)
    for batch, n in ((64, 128), (16, 500), (4, 1024)):
        what = f"eigvalsh of {batch} float64 Grams of {n}, {torch.get_num_threads()} CPU threads"
        if what in done:
            continue
        x = torch.randn(batch, n, 32, generator=draw, dtype=torch.float64)
        grams = x @ x.mT / 32
        there = grams.to(device)
        acts = {"cpu": lambda g=grams: torch.linalg.eigvalsh(g), "device": lambda g=there: torch.linalg.eigvalsh(g)}
        times = in_turns(acts, 3, device)
        cpu, other = (statistics.median(times[name]) for name in ("cpu", "device"))
        yield {"what": what, "beside": "CPU", "ms": round(1000 * other, 2), "cpu_ms": round(1000 * cpu, 2),
               "ratio": round(cpu / other, 2), "bound": WORTH}  # fmt: skip
    for n in (500, 2000):
        what = f"spanning tree of {n} points (one CPU thread; Borůvka on the device)"
        if what in done:
            continue
        x = np.random.default_rng(0).normal(size=(n, 16))
        table = spanning_tree.small_distance_table(x)
        there = torch.from_numpy(table).to(device)
        zeros = np.zeros_like(table)
        acts = {
            "cpu": lambda t=table, z=zeros: spanning_tree.minimum_spanning_tree(t, z),
            "device": lambda t=there: boruvka(t),
        }
        tree, row = spanning_tree.minimum_spanning_tree(table, zeros), np.arange(1, n)
        wanted, got = float(np.sqrt(table[row, tree[1:]].astype(np.float64)).sum()), boruvka(there)
        assert abs(got / wanted - 1) < 1e-6, (got, wanted)
        times = in_turns(acts, 3, device)
        cpu, other = (statistics.median(times[name]) for name in ("cpu", "device"))
        yield {"what": what, "beside": "CPU", "ms": round(1000 * other, 2), "cpu_ms": round(1000 * cpu, 2),
               "ratio": round(cpu / other, 2), "bound": WORTH}  # fmt: skip

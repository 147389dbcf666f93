"""What MINT's scores cost: a perceptron pair against SciPy, a VGG-16 pair, ResNet-50's whole list from measured tiles.

    OMP_NUM_THREADS=2 python benchmarks/mint.py [--json FILE]

Normal random activations (trees take the same time on any), float64, threads = OMP_NUM_THREADS. The released program's
45.7 s a score and SciPy's 5.4 s are the specification's figures for such a machine; SciPy is measured here again.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from dist_prune import models
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.methods.mint import Mint, spanning_tree
from dist_prune.methods.mint.layer_pairs import contiguous_groups
from dist_prune.methods.mint.mutual_information import ConditionalDependence, split_sizes
from dist_prune.methods.mint.options import Options
from dist_prune.pruning.surgery.verified_trace import trace_groups

THREADS = int(os.environ["OMP_NUM_THREADS"])


def activations(images: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(images, width))


def pair(parent: int, child: int, groups: int, images: int) -> ConditionalDependence:
    """A layer pair whose child depends on its parent."""
    below = activations(images, parent, 0)
    above = below @ activations(parent, child, 1) / np.sqrt(parent) + 0.1 * activations(images, child, 2)
    parts = [contiguous_groups(width, groups, True, "layer") for width in (child, parent)]
    return ConditionalDependence(above, below, parts[0], parts[1], threads=THREADS)


def seconds(act: Callable[[], Any], repeats: int = 3) -> float:
    """Median seconds of ``repeats`` calls after one that is not counted."""
    act()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def scipy_score(work: ConditionalDependence, child: int, parent: int) -> int:
    """R of one score by KD-tree, cdist and SciPy's tree on the group's own rows."""
    columns = list(work.parent_groups[parent])
    rest = [k for k in range(work.parent.shape[1]) if k not in columns]
    y, z = work.parent[:, columns], work.parent[:, rest]
    donors = cKDTree(z[work.b]).query(z[work.a])[1]
    rows = np.concatenate([np.hstack([y[work.c], z[work.c]]), np.hstack([y[work.b][donors], z[work.a]])])
    found = minimum_spanning_tree(
        cdist(*[np.hstack([work.child[:, list(work.child_groups[child])], rows])] * 2)
    ).tocoo()
    first = len(work.c)
    return int(((found.row < first) != (found.col < first)).sum())


def perceptron() -> dict[str, float]:
    """All 400 scores of the 500 -> 300 pair, n = 2,500, 20 groups a side; four of them by SciPy."""
    pair(40, 40, 4, 120).cross_edges(range(4))  # compiles
    start = time.perf_counter()
    work = pair(500, 300, 20, 2500)
    built = time.perf_counter()
    table = work.cross_edges(range(20))
    whole = time.perf_counter() - built
    some = [(0, 0), (7, 3), (19, 19), (4, 11)]
    begin = time.perf_counter()
    same = [scipy_score(work, c, g) == table[c, g] for c, g in some]
    return {
        "prepare_s": built - start, "seconds": whole, "scipy_per_score_s": (time.perf_counter() - begin) / len(some),
        "equal": all(same),
    }  # fmt: skip


def vgg(tiles: int) -> dict[str, float]:
    """One pair of 512 -> 512 channels, 64 x 64 groups, n = 6,500: ``tiles`` of the 8 tiles of 512 scores each."""
    work = pair(512, 512, 64, 6500)
    start = time.perf_counter()
    work.parent_table(0)  # and what every other table is made of
    prepared = time.perf_counter()
    for begin in range(0, 8 * tiles, 8):
        work.cross_edges(range(begin, begin + 8))
    tile = (time.perf_counter() - prepared) / tiles
    return {"tiles": tiles, "prepare_s": prepared - start, "tile_s": tile, "seconds": prepared - start + 8 * tile}


def resnet50() -> dict[str, float]:
    """Seconds of all 212,992 scores at n = 5,000 on one thread, from the parts measured at their true sizes.

    A pair takes its parent's distances once, a table for each parent group, a child table for each child group and tile
    of eight parent groups, and a tree for each score.
    """
    channels = trace_groups(models.create("resnet50", 1000, 3).eval(), torch.zeros(1, 3, 64, 64))
    pairs = Mint(Options(groups=64, skip=("fc",))).pairs(channels)
    points = sum(split_sizes(5000))
    nothing = np.zeros((points, points), np.float32)
    table = spanning_tree.small_distance_table(activations(points, 32, 3))
    tree = seconds(lambda: spanning_tree.minimum_spanning_tree(table, nothing))
    base = {w: seconds(lambda w=w: _square(points, w), 1) for w in (64, 512)}
    full = spanning_tree.squared_distances(activations(points, 8, 0), activations(points, 8, 0))
    exchange, few = {}, {}
    for width in {len(p.y[0]) for p in pairs} | {len(p.x[0]) for p in pairs}:
        part = activations(points, width, 4)
        exchange[width] = seconds(lambda part=part: spanning_tree.replace_coordinates(full, part, part), 1)
        few[width] = seconds(lambda part=part: spanning_tree.small_distance_table(part), 1)
    total = trees = 0.0
    for p in pairs:
        width, scores = p.below.width, len(p.x) * len(p.y)
        slope = (base[512] - base[64]) / 448
        total += 1.25 * (base[64] + slope * (width - 64))  # and a quarter of it for the thirds across
        total += 1.25 * len(p.y) * exchange[len(p.y[0])] + len(p.x) * len(p.y) / 8 * few[len(p.x[0])]
        trees += scores * tree
    return {"pairs": len(pairs), "scores": sum(len(p.x) * len(p.y) for p in pairs), "tree_ms": 1000 * tree,
            "tables_s": total, "trees_s": trees}  # fmt: skip


def _square(points: int, width: int) -> np.ndarray:
    rows = activations(points, width, 5)
    return spanning_tree.squared_distances(rows, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the same figures here")
    parser.add_argument("--only", choices=("perceptron", "vgg", "resnet50"), help="one of the three")
    parser.add_argument("--tiles", type=int, default=8, choices=range(1, 9), help="of the VGG-16 pair, measured")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    machine = describe_environment(DistributedEnvironment.single_process())
    print(f"{machine['processor']}, {machine['cores']} cores, {THREADS} thread(s)")
    body: dict[str, Any] = {"machine": machine, "threads": THREADS}
    for name, act in (("perceptron", perceptron), ("vgg", lambda: vgg(given.tiles)), ("resnet50", resnet50)):
        if given.only in (None, name):
            body[name] = act()
    if p := body.get("perceptron"):
        print(f"400 scores, 500 -> 300, n = 2,500, G = 20     {p['seconds']:8.1f} s   at most 20 s on 2 cores")
        print(f"one score                                     {p['seconds'] / 400:8.3f} s")
        print(
            f"one score by SciPy (mean of 4)                {p['scipy_per_score_s']:8.2f} s   the same R: {p['equal']}"
        )
    if v := body.get("vgg"):
        how = "" if v["tiles"] == 8 else f"   extrapolated from {v['tiles']} of 8 tiles"
        print(f"4,096 scores, 512 -> 512, n = 6,500, G = 64   {v['seconds']:8.1f} s{how}")
    if r := body.get("resnet50"):
        hours = (r["tables_s"] + r["trees_s"]) / 3600
        print(f"one tree of 3,333 points, one thread          {r['tree_ms']:8.1f} ms")
        print(f"ResNet-50, {r['scores']:,} scores, extrapolated: {hours:.2f} core hours, {hours / 8:.2f} h on 8 ranks")
    if given.json:
        given.json.write_text(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()

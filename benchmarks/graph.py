"""The redundancy graph alone: similarity and selection on maps of the paper's layer shapes, no network around them.

    python benchmarks/graph.py [--repeats 5] [--threads 2] [--json FILE]

Maps are mixtures of a few smooth base maps and noise (white noise has no edges). T = 100 images in micro-batches of 50,
as in a run. The authors' times are those of the specification: their program on such a machine, extrapolated.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.methods.graph.kcore import connected_components, decompose
from dist_prune.methods.graph.method import HashAgreement, edges
from dist_prune.pipeline.git import commit_of
from dist_prune.pruning.figure_data import SimilarityMap
from dist_prune.pruning.graph.groups import HookPoint
from dist_prune.pruning.hooks.statistics import Accumulator
from dist_prune.report.figures import similarity_image

IMAGES, MICRO = 100, 50
VGG = [(64, 32)] * 2 + [(128, 16)] * 2 + [(256, 8)] * 3 + [(512, 4)] * 3 + [(512, 2)] * 3  # channels, side


def maps_of(channels: int, side: int, seed: int = 0) -> Tensor:
    """(T, C, side, side): every channel is one of C / 4 smooth maps of its image, and noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(IMAGES, channels // 4, max(2, side // 4), max(2, side // 4), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    which = torch.randint(0, channels // 4, (channels,), generator=generator)
    return smooth[:, which] + 0.1 * torch.randn(IMAGES, channels, side, side, generator=generator)


def timed(maps: Tensor, threshold: float = 0.75) -> tuple[float, float, int]:
    """Seconds of similarity, seconds of selection, filters kept."""
    channels = maps.shape[1]
    site = HookPoint("conv", "conv", channels, "conv", True)
    worth = np.random.default_rng(0).random(channels)
    start = time.perf_counter()
    tally = Accumulator(HashAgreement(8), [site], IMAGES, torch.device("cpu"))
    for first in range(0, IMAGES, MICRO):
        tally.update(site, maps[first : first + MICRO], torch.arange(first, first + MICRO))
    gram = tally.tables["conv"]["gram"]
    ones = gram.diagonal()
    hamming = ones[:, None] + ones[None, :] - 2 * gram
    middle = time.perf_counter()
    kept = decompose(edges(hamming, int(tally.tables["conv"]["bits"]) * IMAGES, threshold), worth)
    return middle - start, time.perf_counter() - middle, len(kept)


def layers(shapes: list[tuple[int, int]], repeats: int) -> dict[str, Any]:
    """Medians over repeats of the sums over layers."""
    maps = {shape: maps_of(*shape) for shape in set(shapes)}
    found = []
    for _ in range(repeats + 1):
        each = [timed(maps[shape]) for shape in shapes]
        found.append(tuple(map(sum, zip(*each, strict=True))))
    similarity, selection = (statistics.median(row[i] for row in found[1:]) for i in (0, 1))
    return {"similarity_s": similarity, "selection_s": selection, "kept": found[-1][2], "of": sum(c for c, _ in shapes)}


def selection(nodes: int, chance: float, repeats: int) -> dict[str, Any]:
    """Selection of a random graph."""
    rng, seconds, kept = np.random.default_rng(0), [], []
    table = np.triu(rng.random((nodes, nodes)) < chance, 1)
    table |= table.T
    worth = rng.random(nodes)
    for _ in range(repeats + 1):
        start = time.perf_counter()
        kept = decompose(table, worth)
        seconds.append(time.perf_counter() - start)
    return {"selection_s": statistics.median(seconds[1:]), "kept": len(kept), "of": nodes}


def portrait(nodes: int, repeats: int) -> dict[str, Any]:
    """Clusters and picture of a group for the report."""
    rng, seconds = np.random.default_rng(0), []
    likeness = rng.random((nodes, nodes))
    near = np.triu(likeness > 0.998, 1)
    for _ in range(repeats + 1):
        start = time.perf_counter()
        similarity_image(
            SimilarityMap("conv", likeness, connected_components(near | near.T), rng.random(nodes) < 0.5, "")
        )
        seconds.append(time.perf_counter() - start)
    return {"picture_s": statistics.median(seconds[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the same figures here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    body: dict[str, Any] = {
        "machine": describe_environment(DistributedEnvironment.single_process()),
        "commit": commit_of(Path(__file__)),
        "threads": given.threads,
        "vgg16": layers(VGG, given.repeats),
        "wide": layers([(2048, 7)], given.repeats),
        "dense": selection(2048, 0.3, given.repeats),
        "sparse": selection(2048, 0.002, given.repeats),
        "portrait": portrait(2048, given.repeats),
    }
    vgg, wide, dense, sparse, drawn = (body[key] for key in ("vgg16", "wide", "dense", "sparse", "portrait"))
    whole, one = (part["similarity_s"] + part["selection_s"] for part in (vgg, wide))
    print(f"| T = {IMAGES} images, {given.threads} threads | measured | bound | authors |\n|---|---|---|---|")
    rows = [
        ("similarity of the 13 layers of VGG-16", vgg["similarity_s"], "", ""),
        ("selection of them", vgg["selection_s"], "", ""),
        ("both", whole, "5 s", "about 37 min (extrapolated)"),
        ("similarity and selection, 2,048 channels, 7x7 maps", one, "3 s", "about 80 min (extrapolated)"),
        ("selection, random graph, 2,048 nodes, edge chance 0.3", dense["selection_s"], "1 s", ""),
        ("selection, random graph, 2,048 nodes, edge chance 0.002", sparse["selection_s"], "", ""),
        ("clusters and picture of 2,048 channels for the report", drawn["picture_s"], "", ""),
    ]
    for name, seconds, bound, authors in rows:
        print(f"| {name} | {seconds:.3f} s | {bound and 'under ' + bound} | {authors} |")
    print(f"\nkept {vgg['kept']} of {vgg['of']} (VGG-16), {wide['kept']} of {wide['of']} (2,048 channels)")
    if given.json:
        given.json.write_text(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()

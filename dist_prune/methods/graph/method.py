"""Redundancy graphs: filters whose feature maps hash alike are redundant; innermost k-cores are thinned out.

Li, Shao, Deng, Jiang: Efficient filter pruning: reducing model complexity through redundancy graph decomposition,
Neurocomputing 2024. Shapes: T images, C filters, K x K hash bits.
"""

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.methods import base
from dist_prune.methods.graph.kcore import connected_components, decompose
from dist_prune.pruning.figure_data import SimilarityMap
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph, HookPoint, Layer
from dist_prune.pruning.hooks.statistics import State, Statistic
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.group_scores import protect
from dist_prune.pruning.selection.ranking import (
    Kept,
    SelectionRequest,
    check_target,
    cost_share,
    counts_of,
    refill_to_floor,
)

Quirk = Literal["train_mode", "augmented", "narrow_classifier", "fresh_classifier"]

# A group is judged by the maps of its leader, the producer with the fewest convolutions before it: the stem or the
# projection shortcut of a residual stream, the expansion before a depthwise layer. All its other layers follow.
# These leaders cannot be judged, and their groups stay whole:
LEFT_ALONE: tuple[tuple[Callable[[Layer], bool], str], ...] = (
    (lambda leader: leader.kind != "conv", "a linear layer has no feature maps to hash"),
    (lambda leader: leader.positions == 1, "its 1x1 maps carry no hash"),
)


class Options(base.QuirkOptions[Quirk]):
    """``combine``: whether a residual stream follows its leader's graph (the paper) or all its layers' hashes."""

    released = ("train_mode", "augmented")  # the second release, whose figures are the paper's

    hash_size: int = Field(
        default=8, ge=1, le=1024, description="low-frequency corner of the DCT that is hashed, per side"
    )
    combine: Literal["leader", "sum"] = base.select_only(
        "leader", description="who decides for a residual stream: its leader's graph (the paper), or all its layers'"
    )


class Graph(base.Method):
    """One knob, the similarity threshold; how many filters stay falls out of it."""

    paper = "Li et al., Efficient filter pruning by redundancy graph decomposition, Neurocomputing 2024"
    Options = Options

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Per convolution site: ``<site>:hamming`` (C, C) int64 summed over images, ``<site>:bits`` (2,) int64, bits
        per map and images, ``<site>:l1`` (C,) float64 filter norms of the unpruned weights."""
        points = [
            point for point in context.sites if point.kind == "conv" and context.graph.layers[point.name].positions > 1
        ]
        if self.has("train_mode"):
            base.check_one_batch(context.images)
        view = {**(train_mode() if self.has("train_mode") else {}), **(augmented() if self.has("augmented") else {})}
        scores: base.Scores = {}
        for name, tables in context.collect(points, HashAgreement(self.options.hash_size), **view).items():
            ones = tables["gram"].diagonal()
            scores[f"{name}:hamming"] = ones[:, None] + ones[None, :] - 2 * tables["gram"]
            scores[f"{name}:bits"] = torch.stack([tables["bits"], tables["images"]])
        for point in points:
            scores[f"{point.name}:l1"] = context.weight(point).double().abs().flatten(1).sum(1)
        return scores

    def prunable(self, graph: DependencyGraph) -> DependencyGraph:
        graph = super().prunable(graph)
        follows = narrow_classifier(graph) if self.has("narrow_classifier") else {}

        def reason(group: ChannelGroup) -> str:
            leader = graph.layers[group.name]
            return next((why for applies, why in LEFT_ALONE if group.name not in follows and applies(leader)), "")

        return protect(graph, reason)

    def layers_to_reinit(self, graph: DependencyGraph) -> tuple[str, ...]:
        return fresh_classifier(graph) if self.has("fresh_classifier") else ()

    def check(self, graph: DependencyGraph, request: SelectionRequest) -> None:
        if (request.threshold is None) == (request.target is None):
            raise PruneError("graph: set either select.threshold (the paper's knob, 0 to 1) or one target, not both")
        for key in ("keep_ratio", "counts"):
            if getattr(request, key) is not None:
                raise PruneError(f"select.{key}: graph has none; how many filters stay falls out of the threshold")
        check_target(graph, request)

    def select(self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest) -> Plan:
        graph = self.prunable(graph)
        self.check(graph, request)
        _, kept, tables = self._solved(scores, graph, request)
        reasons = dict.fromkeys(tables, "no two of its filters are as similar as the threshold")
        return Plan.from_kept(graph, kept, reasons)

    def similarity_maps(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> Iterator[SimilarityMap]:
        """Each judged group's similarity matrix, clustered by the connected parts of its graph."""
        threshold, kept, tables = self._solved(scores, self.prunable(graph), request)
        for name, table in tables.items():
            clusters, stays = (
                connected_components(edges(table.hamming, table.bits, threshold)),
                np.zeros(len(table.l1), dtype=bool),
            )
            stays[kept[name]] = True
            said = (
                f"{len(stays)} filters, {int(stays.sum())} kept; at similarity {threshold:.4g} "
                f"{clusters.max(initial=-1) + 1} clusters and {int((clusters < 0).sum())} filters like no other"
            )
            yield SimilarityMap(name, 1 - table.hamming.numpy() / table.bits, clusters, stays, said)

    def _solved(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> tuple[float, Kept, dict[str, "GraphInputs"]]:
        """The threshold, given or found for the target; what it keeps of each free group; the judged groups' tables."""
        follows = narrow_classifier(graph) if self.has("narrow_classifier") else {}
        tables = {g.name: self._table(scores, g.producers) for g in graph.free if g.name not in follows}
        worth = {name: table.l1 for name, table in tables.items()}
        worth |= {name: worth[feeder] for name, feeder in follows.items() if feeder in worth}

        def keep_at(threshold: float) -> Kept:
            kept = {n: decompose(edges(t.hamming, t.bits, threshold), t.l1.numpy()) for n, t in tables.items()}
            kept |= {name: kept[feeder] for name, feeder in follows.items() if feeder in kept}
            return refill_to_floor(graph, request, kept, worth)

        if request.threshold is not None:
            return request.threshold, keep_at(request.threshold), tables
        return *_search(keep_at, graph, request), tables

    def _table(self, scores: Mapping[str, Tensor], producers: tuple[str, ...]) -> "GraphInputs":
        """Of a group's leader, or summed over its layers that carry a hash."""
        names = producers[:1]
        if self.options.combine == "sum":
            names = tuple(n for n in producers if f"{n}:bits" in scores and int(scores[f"{n}:bits"][0]) > 1)
        return GraphInputs(
            torch.stack([self.require_score(scores, f"{name}:hamming") for name in names]).sum(0),
            sum(int(self.require_score(scores, f"{name}:bits").prod()) for name in names),
            torch.stack([self.require_score(scores, f"{name}:l1") for name in names]).sum(0),
        )


class GraphInputs(NamedTuple):
    """What the graph of a group is made of: (C, C) Hamming distances, bits compared per pair, (C,) filter norms."""

    hamming: Tensor
    bits: int
    l1: Tensor


def train_mode() -> dict[str, bool]:
    """Quirk: the released program never calls eval(), so batch norms use the statistics of the one batch of all images
    (specification, section 4). Hashes of one image depend on the others."""
    return {"train_mode": True}


def augmented() -> dict[str, bool]:
    """Quirk: the released program hashes images with the training augmentation; here it follows the recipe's seed."""
    return {"augment": True}


def narrow_classifier(graph: DependencyGraph) -> dict[str, str]:
    """Quirk of the first release: a hidden linear layer as wide as the convolution before it is cut like it.

    Returns: linear group -> the group whose kept filters it takes.
    """
    found = {}
    for hidden in graph.groups:
        if graph.layers[hidden.name].kind == "linear" and (not hidden.protected):
            feeders = [group for group in graph.groups if group.per_channel.get((hidden.name, "in")) == 1]
            if len(feeders) == 1 and feeders[0].width == hidden.width and not feeders[0].protected:
                found[hidden.name] = feeders[0].name
    return found


def fresh_classifier(graph: DependencyGraph) -> tuple[str, ...]:
    """Quirk of the first release: linear layers, and norms between them, do not inherit weights. (It drew biases of
    convolutions anew as well, which a batch norm behind them removes again.)"""
    linear = [name for name, layer in graph.layers.items() if layer.kind == "linear"]
    behind = [c.layer for g in graph.groups if g.name in linear for c in g.couplings]
    return tuple(dict.fromkeys(n for n in [*linear, *behind] if graph.layers[n].kind in ("linear", "norm")))


class HashAgreement(Statistic):
    """How often the perceptual hashes of two filters' maps agree, as integers (specification 2.1 and 2.2).

    States: ``gram`` (C, C), sum over images and bits of b_i b_j; ``images``; ``bits`` per map.
    """

    def __init__(self, hash_size: int):
        self.hash_size = hash_size

    def states(self, point: HookPoint) -> dict[str, State]:
        return {"gram": State("sum", (point.width, point.width)), "images": State("sum"), "bits": State("max")}

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        bits = hash_bits(maps, self.hash_size)
        rows = bits.transpose(0, 1).reshape(point.width, -1).to(torch.float32)
        tables["gram"] += (rows @ rows.T).to(torch.int64)  # a micro-batch holds far fewer than 2**24 bits: exact
        tables["images"] += len(maps)
        tables["bits"].clamp_(min=bits.shape[2])


def hash_bits(maps: Tensor, size: int) -> Tensor:
    """Perceptual hash of each map: (n, C, H, W) -> (n, C, K_h K_w) bool, K = min(size, side).

    Un-normalised DCT-II over rows and columns, low-frequency corner, bit = at least the corner's mean, DC included.
    """
    n, c, height, width = maps.shape
    rows = _dct(height, min(size, height), maps.dtype, maps.device)
    columns = _dct(width, min(size, width), maps.dtype, maps.device)
    if height * width <= 64:  # small maps: one product with all K_h K_w two-dimensional waves is faster
        corner = maps.reshape(n * c, -1) @ torch.kron(rows, columns).T
    else:
        half = torch.bmm(rows.expand(n * c, -1, -1), maps.reshape(n * c, height, width))
        corner = (half.view(-1, width) @ columns.T).view(n * c, -1)
    return (corner >= corner.mean(1, keepdim=True)).view(n, c, -1)


@lru_cache(maxsize=64)
def _dct(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(k, n): the first k rows of the DCT-II, 2 cos(pi r (2c + 1) / 2n)."""
    r, c = torch.arange(k, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None]
    return (2 * torch.cos(math.pi * r * (2 * c + 1) / (2 * n))).to(device, dtype)


def edges(hamming: Tensor, bits: int, threshold: float) -> np.ndarray:
    """(C, C) bool adjacency: similarity 1 - hamming / bits at least ``threshold``, decided on integers."""
    near = hamming.numpy() <= math.floor((1 - threshold) * bits + 1e-9)
    np.fill_diagonal(near, False)
    return near


def _search(keep_at: Callable[[float], Kept], graph: DependencyGraph, request: SelectionRequest) -> tuple[float, Kept]:
    """The largest network within the target among the thresholds that a bisection visits, and its threshold.

    A higher threshold keeps more filters, though not strictly so: a removal can spare another filter further out.
    """
    assert request.target is not None
    check_target(graph, request)
    quantity, share = request.target
    low, high, steps = 0.0, 1.0, 20
    best, best_at = keep_at(low), low
    best_share = cost_share(graph, quantity, counts_of(best))
    for _ in range(steps):
        middle = (low + high) / 2
        kept = keep_at(middle)
        left = cost_share(graph, quantity, counts_of(kept))
        low, high = (middle, high) if left <= share else (low, middle)
        if best_share <= left <= share:
            best, best_at, best_share = kept, middle, left
    return best_at, best

"""Redundancy graphs: filters whose feature maps hash alike are redundant; the innermost k-cores are thinned out.

Li, Shao, Deng, Jiang: Efficient filter pruning: reducing model complexity through redundancy graph decomposition,
Neurocomputing 2024. With T images, C filters of a layer and K x K hash bits per map:

    bit h = 1 if a coefficient of the low-frequency K x K corner of the map's DCT-II is at least the corner's mean
    S_ij = 1 - 1/(K^2 T) sum over images t of Hamming(h_ti, h_tj)
    edge between filters i and j if S_ij is at least the threshold; the graph is thinned out by ``kcore.decompose``

It needs calibration images (the paper takes 100); no labels, no gradients.
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
from dist_prune.methods.needs import Needs
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
BISECTIONS = 20  # of the threshold

# A group is scored by the maps of its leader, the producer with the fewest convolutions before it: the stem or the
# projection shortcut of a residual stream, the expansion before a depthwise layer. The group's other layers follow it.
# Groups with these leaders are protected: condition, and reason.
UNSCORABLE: tuple[tuple[Callable[[Layer], bool], str], ...] = (
    (lambda leader: leader.kind != "conv", "a linear layer has no feature maps to hash"),
    (lambda leader: leader.positions == 1, "its 1x1 maps carry no hash"),
)


class Options(base.QuirkOptions[Quirk]):
    """Options of redundancy graphs.

    Attributes:
        hash_size: K, the side of the DCT's corner.
        combine: whose hashes decide for a residual stream.
    """

    released = ("train_mode", "augmented")  # the second release, whose figures are the paper's

    hash_size: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="side of the low-frequency corner of the DCT that is hashed, in coefficients",
    )
    combine: Literal["leader", "sum"] = base.select_only(
        "leader",
        description="source of a residual stream's graph: the hashes of its leader (the paper), or of all layers",
    )


class Graph(base.Method):
    """Of similar filters the one of the largest L1 norm stays.

    The similarity threshold (``select.threshold``) decides how many filters stay. With a target it is found by
    bisection.
    """

    paper = "Li et al., Efficient filter pruning by redundancy graph decomposition, Neurocomputing 2024"
    needs = Needs()
    Options = Options

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Compare the hashes of all filters of each convolution.

        Returns:
            For each convolution with maps larger than 1x1 that produces a free group: ``<layer>:hamming``, (C, C)
            int64 Hamming distances summed over images; ``<layer>:bits``, (2,) int64, bits per map and number of images;
            ``<layer>:l1``, (C,) float64 L1 norms of the filters.

        Raises:
            PruneError: the quirk ``train_mode`` gets more images than one batch may hold.
        """
        points = [
            point
            for point in context.hook_points
            if point.kind == "conv" and context.graph.layers[point.name].positions > 1
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
            return next((why for applies, why in UNSCORABLE if group.name not in follows and applies(leader)), "")

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
        _, kept, inputs = self._decompose_groups(scores, graph, request)
        return Plan.from_kept(
            graph, kept, dict.fromkeys(inputs, "no two of its filters are as similar as the threshold")
        )

    def similarity_maps(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> Iterator[SimilarityMap]:
        """The similarity matrix of each scored group, clustered by the connected components of its graph."""
        threshold, kept, inputs = self._decompose_groups(scores, self.prunable(graph), request)
        for name, own in inputs.items():
            clusters = connected_components(edges(own.hamming, own.bits, threshold))
            stays = np.zeros(len(own.l1), dtype=bool)
            stays[kept[name]] = True
            caption = (
                f"{len(stays)} filters, {int(stays.sum())} kept; at similarity {threshold:.4g} "
                f"{clusters.max(initial=-1) + 1} clusters and {int((clusters < 0).sum())} filters like no other"
            )
            yield SimilarityMap(name, 1 - own.hamming.numpy() / own.bits, clusters, stays, caption)

    def _decompose_groups(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> tuple[float, Kept, dict[str, "GraphInputs"]]:
        """The threshold (given, or found for the target), the filters that it keeps, and each scored group's inputs."""
        follows = narrow_classifier(graph) if self.has("narrow_classifier") else {}
        inputs = {g.name: self._graph_inputs(scores, g.producers) for g in graph.free if g.name not in follows}
        importance = {name: own.l1 for name, own in inputs.items()}
        importance |= {name: importance[feeder] for name, feeder in follows.items() if feeder in importance}

        def keep_at(threshold: float) -> Kept:
            kept = {
                name: decompose(edges(own.hamming, own.bits, threshold), own.l1.numpy()) for name, own in inputs.items()
            }
            kept |= {name: kept[feeder] for name, feeder in follows.items() if feeder in kept}
            return refill_to_floor(graph, request, kept, importance)

        if request.threshold is not None:
            return request.threshold, keep_at(request.threshold), inputs
        return *_search_threshold(keep_at, graph, request), inputs

    def _graph_inputs(self, scores: Mapping[str, Tensor], producers: tuple[str, ...]) -> "GraphInputs":
        """The tables of a group's leader, or their sums over the layers that have hashes (maps larger than 1x1)."""
        names = producers[:1]
        if self.options.combine == "sum":
            names = tuple(n for n in producers if f"{n}:bits" in scores and int(scores[f"{n}:bits"][0]) > 1)
        return GraphInputs(
            torch.stack([self.require_score(scores, f"{name}:hamming") for name in names]).sum(0),
            sum(int(self.require_score(scores, f"{name}:bits").prod()) for name in names),
            torch.stack([self.require_score(scores, f"{name}:l1") for name in names]).sum(0),
        )


class GraphInputs(NamedTuple):
    """The tables that the graph of a group follows from.

    Attributes:
        hamming: (C, C) int64 Hamming distances, summed over images.
        bits: bits that were compared per pair of filters.
        l1: (C,) float64 L1 norms of the filters.
    """

    hamming: Tensor
    bits: int
    l1: Tensor


def train_mode() -> dict[str, bool]:
    """Quirk: the released program never calls eval(), so the hashes of one image depend on the others.

    Batch norms use the statistics of one batch of all images. (Specification, section 4.)

    Returns:
        Keyword arguments of ``ScoringContext.collect``.
    """
    return {"train_mode": True}


def augmented() -> dict[str, bool]:
    """Quirk: the released program hashes images with the training augmentation; here it follows the recipe's seed.

    Returns:
        Keyword arguments of ``ScoringContext.collect``.
    """
    return {"augment": True}


def narrow_classifier(graph: DependencyGraph) -> dict[str, str]:
    """Quirk of the first release: a hidden linear layer as wide as the convolution before it is cut like it.

    Args:
        graph: the dependency graph.

    Returns:
        Name of a linear layer's group -> name of the group whose kept filters it takes.
    """
    followed = {}
    for hidden in graph.groups:
        if graph.layers[hidden.name].kind == "linear" and (not hidden.protected):
            feeders = [group for group in graph.groups if group.per_channel.get((hidden.name, "in")) == 1]
            if len(feeders) == 1 and feeders[0].width == hidden.width and not feeders[0].protected:
                followed[hidden.name] = feeders[0].name
    return followed


def fresh_classifier(graph: DependencyGraph) -> tuple[str, ...]:
    """Quirk of the first release: linear layers, and the norms between them, do not inherit weights.

    The release drew new biases of convolutions as well, which the batch norms after them remove again.

    Args:
        graph: the dependency graph.

    Returns:
        Module paths of the layers that get new weights.
    """
    linear = [name for name, layer in graph.layers.items() if layer.kind == "linear"]
    after = [c.layer for g in graph.groups if g.name in linear for c in g.couplings]
    return tuple(dict.fromkeys(n for n in [*linear, *after] if graph.layers[n].kind in ("linear", "norm")))


class HashAgreement(Statistic):
    """How often the perceptual hashes of two filters' maps agree, as integers (specification, 2.1 and 2.2).

    States, int64: ``gram`` (C, C), the sum over images and bits of b_i b_j; ``images`` (), their number; ``bits`` (),
    bits per map.

    Args:
        hash_size: K, the side of the DCT's corner.
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
    """The perceptual hash of each map (specification, 2.1).

    A bit says whether a coefficient of the un-normalised DCT-II, in the low-frequency corner, is at least the mean of
    the corner, the constant coefficient included.

    Args:
        maps: (n, C, H, W) floating point.
        size: K, the largest side of the corner.

    Returns:
        (n, C, K_h K_w) bool with K_h = min(K, H) and K_w = min(K, W).
    """
    n, c, height, width = maps.shape
    rows = _dct_matrix(height, min(size, height), maps.dtype, maps.device)
    columns = _dct_matrix(width, min(size, width), maps.dtype, maps.device)
    if height * width <= 64:  # small maps: one product with all K_h K_w two-dimensional waves is faster
        corner = maps.reshape(n * c, -1) @ torch.kron(rows, columns).T
    else:
        half = torch.bmm(rows.expand(n * c, -1, -1), maps.reshape(n * c, height, width))
        corner = (half.view(-1, width) @ columns.T).view(n * c, -1)
    return (corner >= corner.mean(1, keepdim=True)).view(n, c, -1)


@lru_cache(maxsize=64)
def _dct_matrix(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(k, n): the first k rows of the DCT-II, 2 cos(pi r (2c + 1) / 2n)."""
    r = torch.arange(k, dtype=torch.float64)[:, None]
    c = torch.arange(n, dtype=torch.float64)[None]
    return (2 * torch.cos(math.pi * r * (2 * c + 1) / (2 * n))).to(device, dtype)


def edges(hamming: Tensor, bits: int, threshold: float) -> np.ndarray:
    """The adjacency matrix of a redundancy graph, decided on integers (specification, 2.2).

    Args:
        hamming: (C, C) int64 Hamming distances.
        bits: bits that were compared per pair.
        threshold: smallest similarity 1 - hamming / bits of an edge, 0 to 1.

    Returns:
        (C, C) bool with a diagonal of False.
    """
    near = hamming.numpy() <= math.floor((1 - threshold) * bits + 1e-9)
    np.fill_diagonal(near, False)
    return near


def _search_threshold(
    keep_at: Callable[[float], Kept], graph: DependencyGraph, request: SelectionRequest
) -> tuple[float, Kept]:
    """The threshold of the largest network within the target, among those that a bisection visits, and its filters.

    A higher threshold keeps more filters, though not strictly: a removal can spare another filter further out.
    """
    assert request.target is not None
    check_target(graph, request)
    quantity, share = request.target
    low, high = 0.0, 1.0
    best, best_at = keep_at(low), low
    best_share = cost_share(graph, quantity, counts_of(best))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        kept = keep_at(middle)
        kept_share = cost_share(graph, quantity, counts_of(kept))
        low, high = (middle, high) if kept_share <= share else (low, middle)
        if best_share <= kept_share <= share:
            best = kept
            best_at = middle
            best_share = kept_share
    return best_at, best

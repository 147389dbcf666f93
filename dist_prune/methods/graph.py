"""Redundancy graphs: filters whose feature maps hash alike are redundant; innermost k-cores are thinned out.

Li, Shao, Deng, Jiang: Efficient filter pruning: reducing model complexity through redundancy graph decomposition,
Neurocomputing 2024. Shapes: T images, C filters, K x K hash bits.
"""

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.methods import method
from dist_prune.pruning.channels import ChannelGroup, Channels, Site
from dist_prune.pruning.choose import Kept, Request, check_target, counts_of, fill, share_of
from dist_prune.pruning.plan import Plan
from dist_prune.pruning.statistic import State, Statistic


class Options(method.MethodOptions):
    """``combine``: whether a residual stream follows its leader's graph (the paper) or all its layers' hashes."""

    hash_size: int = Field(default=8, ge=1, description="low-frequency corner of the DCT that is hashed, per side")
    combine: Literal["leader", "sum"] = method.for_select("leader")


class Graph(method.Method):
    """One knob, the similarity threshold; how many filters stay falls out of it."""

    paper = "Li et al., Efficient filter pruning by redundancy graph decomposition, Neurocomputing 2024"
    Options = Options

    def score(self, bench: method.Bench) -> method.Scores:
        """Per convolution site: ``<site>:hamming`` (C, C) int64 summed over images, ``<site>:bits`` (2,) int64, bits
        per map and images, ``<site>:l1`` (C,) float64 filter norms of the unpruned weights."""
        sites = [site for site in bench.sites if site.kind == "conv" and bench.channels.layers[site.name].positions > 1]
        scores: method.Scores = {}
        for name, tables in bench.observe(sites, HashAgreement(self.options.hash_size)).items():
            ones = tables["gram"].diagonal()
            scores[f"{name}:hamming"] = ones[:, None] + ones[None, :] - 2 * tables["gram"]
            scores[f"{name}:bits"] = torch.stack([tables["bits"], tables["images"]])
        for site in sites:
            scores[f"{site.name}:l1"] = bench.weight(site).double().abs().flatten(1).sum(1)
        return scores

    def limits(self, channels: Channels) -> Channels:
        def judged(group: ChannelGroup) -> ChannelGroup:
            layer = channels.layers[group.name]
            reason = ""
            if layer.kind != "conv":
                reason = "a linear layer has no feature maps to hash"
            elif layer.positions == 1:
                reason = "its 1x1 maps carry no hash"
            return replace(group, protected=group.protected or reason)

        return replace(channels, groups=tuple(judged(group) for group in channels.groups))

    def check(self, channels: Channels, request: Request) -> None:
        if (request.threshold is None) == (request.target is None):
            raise PruneError("graph: set either select.threshold (the paper's knob, 0 to 1) or one target, not both")
        if request.keep_ratio is not None:
            raise PruneError("select.keep_ratio: graph has none; how many filters stay falls out of the threshold")
        check_target(channels, request)

    def select(self, scores: Mapping[str, Tensor], channels: Channels, request: Request) -> Plan:
        channels = self.limits(channels)
        self.check(channels, request)
        tables, worth = {}, {}
        for group in channels.free:
            hamming, bits, worth[group.name] = self._table(scores, group.producers)
            tables[group.name] = (hamming, bits)
        reasons = dict.fromkeys(tables, "no two of its filters are as similar as the threshold")

        def keep_at(threshold: float) -> Kept:
            kept = {n: decompose(edges(h, bits, threshold), worth[n].numpy()) for n, (h, bits) in tables.items()}
            return fill(channels, request, kept, worth)

        kept = keep_at(request.threshold) if request.threshold is not None else _search(keep_at, channels, request)
        return Plan.keeping(channels, kept, reasons)

    def _table(self, scores: Mapping[str, Tensor], producers: tuple[str, ...]) -> tuple[Tensor, int, Tensor]:
        """Hamming distances, bits compared per pair and filter norms of a group, over the layers that carry a hash."""
        names = producers[:1]
        if self.options.combine == "sum":
            names = tuple(n for n in producers if f"{n}:bits" in scores and int(scores[f"{n}:bits"][0]) > 1)
        hamming = torch.stack([self.need(scores, f"{name}:hamming") for name in names]).sum(0)
        bits = sum(int(self.need(scores, f"{name}:bits").prod()) for name in names)
        norms = torch.stack([self.need(scores, f"{name}:l1") for name in names]).sum(0)
        return hamming, bits, norms


class HashAgreement(Statistic):
    """How often the perceptual hashes of two filters' maps agree, as integers (specification 2.1 and 2.2).

    States: ``gram`` (C, C), sum over images and bits of b_i b_j; ``images``; ``bits`` per map.
    """

    def __init__(self, hash_size: int):
        self.hash_size = hash_size

    def states(self, site: Site) -> dict[str, State]:
        return {"gram": State("sum", (site.width, site.width)), "images": State("sum"), "bits": State("max")}

    def update(
        self, site: Site, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        bits = hash_bits(maps, self.hash_size)
        rows = bits.transpose(0, 1).reshape(site.width, -1).to(torch.float32)
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


def decompose(adjacency: np.ndarray, worth: np.ndarray) -> list[int]:
    """The filters that stay (section 3): each connected part of the innermost k-core keeps its worthiest filter, the
    others go; again, until no edge is left.

    Args:
        adjacency: (C, C) symmetric bool, empty diagonal.
        worth: (C,) filter norms; ties fall to the lower index.
    """
    alive = np.ones(len(worth), dtype=bool)
    while True:
        cores = coreness(adjacency, alive)
        if cores.max(initial=0) == 0:
            return np.flatnonzero(alive).tolist()
        left = cores == cores.max()
        while left.any():
            part = _component(adjacency, left)
            left &= ~part
            members = np.flatnonzero(part)
            part[members[np.argmax(worth[members])]] = False
            alive &= ~part


def coreness(adjacency: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """(C,) int: the largest k for which a vertex lies in the k-core of the graph on ``alive`` (0 outside it)."""
    left = alive.copy()
    degree = np.where(left, adjacency[:, left].sum(1), 0)
    cores = np.zeros(len(left), dtype=np.int64)
    k = 0
    while left.any():
        k = max(k, int(degree[left].min()))
        peel = left & (degree <= k)
        cores[peel] = k
        left &= ~peel
        degree = degree - adjacency[peel].sum(0)
    return cores


def _component(adjacency: np.ndarray, within: np.ndarray) -> np.ndarray:
    """(C,) bool: the connected part of ``within`` that holds its first vertex."""
    part = np.zeros_like(within)
    part[np.argmax(within)] = True
    frontier = part
    while frontier.any():
        frontier = adjacency[frontier].any(0) & within & ~part
        part |= frontier
    return part


def _search(keep_at: Callable[[float], Kept], channels: Channels, request: Request) -> Kept:
    """The largest network within the target among the thresholds that a bisection visits.

    A higher threshold keeps more filters, though not strictly so: a removal can spare another filter further out.
    """
    assert request.target is not None
    check_target(channels, request)
    quantity, share = request.target
    low, high, steps = 0.0, 1.0, 20
    best = keep_at(low)
    best_share = share_of(channels, quantity, counts_of(best))
    for _ in range(steps):
        middle = (low + high) / 2
        kept = keep_at(middle)
        left = share_of(channels, quantity, counts_of(kept))
        low, high = (middle, high) if left <= share else (low, middle)
        if best_share <= left <= share:
            best, best_share = kept, left
    return best

"""MINT: blocks of weights between groups of filters go where the conditional mutual information is small.

Ganesh, Corso, Yasaei Sekeh: MINT: deep network compression via mutual information-based neuron trimming, ICPR 2020.
A pair is a layer (child) and what feeds it (parent), each in G groups of neighbouring channels; a block is the weights
between a child group and a parent group.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dist_prune.errors import PruneError, unknown
from dist_prune.methods import base
from dist_prune.methods.mint import spanning_tree
from dist_prune.methods.mint.dead_channels import promote_dead_channels
from dist_prune.methods.mint.layer_pairs import LayerPair, Parts, layer_pairs
from dist_prune.methods.mint.mutual_information import (
    CmiVariant,
    ConditionalDependence,
    mutual_information,
    same_samples,
    sample_images,
    split_sizes,
    tile_size,
    without_replacement,
    worker_count,
)
from dist_prune.methods.mint.thresholds import capped_threshold, global_threshold
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph, Layer
from dist_prune.pruning.hooks.activations import ChannelMeans
from dist_prune.pruning.plan.block_masks import weights_left
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.weight_blocks import WeightBlocks
from dist_prune.pruning.selection.group_scores import protect
from dist_prune.pruning.selection.ranking import SelectionRequest, check_ranking, check_target

Quirk = Literal[
    "independent_samples", "with_replacement", "duplicates_unconnected", "swapped_neighbour", "edge_numbers",
    "clamped_score", "numbered_parents", "distinct_cap",
]  # fmt: skip

Count = Annotated[int, Field(ge=1, le=10**6)]
Share = Annotated[float, Field(ge=0, le=1)]
T = TypeVar("T")


class Options(base.QuirkOptions[Quirk], base.RankingOptions):
    """``groups``: per layer; the largest divisor of its width that is not above it. ``parent_groups``,
    ``child_groups`` and ``caps`` are for single pairs, by (a glob of) the child layer's name."""

    groups: int = Field(default=64, ge=1, le=10**6, description="groups of filters per layer")
    parent_groups: dict[str, Count] = Field(default={}, description="child layer -> groups of its input channels")
    child_groups: dict[str, Count] = Field(default={}, description="child layer -> groups of its filters")
    skip: tuple[str, ...] = Field(default=(), description="globs of layers that keep all their weights")
    taps: Literal["raw", "consumed"] = Field(default="raw", description="layers' outputs, or what the next one is fed")
    samples_per_class: Count | None = Field(default=None, description="of the calibration images; null: all")
    memory_mb: int = base.select_only(2048, ge=64, le=10**9, description="for a process's distances; moves no score")
    p: tuple[Share, ...] = base.select_only((), description="quantile of the scores below which blocks go; a grid")
    quantile: Literal["distinct", "entries", "weights"] = base.select_only(
        "weights", description="what p counts; the paper's program counts distinct scores"
    )
    cap: float | None = base.select_only(None, gt=0, le=1, description="largest share of a pair's blocks that may go")
    caps: dict[str, Annotated[Share, Field(gt=0)]] = base.select_only({}, description="child layer -> its own cap")
    promote: bool = base.select_only(True, description="channels all of whose blocks are cut are removed for real")
    structured: bool | None = base.select_only(
        None, description="remove whole channels by summed score instead of blocks; null: where there is no p"
    )


class Mint(base.RankingMethod):
    """``p`` masks blocks of weights; a target or a keep ratio removes whole channels by their summed scores."""

    paper = "Ganesh et al., MINT: deep network compression via mutual information-based neuron trimming, ICPR 2020"
    why_one_shot = "it masks blocks of weights, and pairs of layers that are masked already cannot be judged"
    Options = Options
    equivariant = False  # groups are made of neighbouring channels

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Per child layer: ``<layer>:edges`` (child groups, parent groups) int64, R of the spanning trees;
        ``<layer>:sizes`` (2,) int64, |C| and |A|."""
        pairs = self.pairs(context.graph)
        taps = {point.name: point for pair in pairs for point in (pair.below, pair.above)}
        found = context.collect(list(taps.values()), ChannelMeans())
        maps = {name: tables["means"].double().numpy() for name, tables in found.items()}
        below, above = self._samples(context)
        parts, budget = split_sizes(len(below)), self.options.memory_mb * 2**20
        threads = worker_count(sum(parts), torch.get_num_threads(), budget)
        scores: base.Scores = {}
        for pair in pairs:  # one pair's tables at a time, kept when it is done
            x, y = maps[pair.above.name][above], maps[pair.below.name][below]
            work = ConditionalDependence(x, y, pair.x, pair.y, self._estimator(), threads)
            step = tile_size(sum(parts), len(pair.y), budget)
            jobs = [(pair.child, start, min(start + step, len(pair.y))) for start in range(0, len(pair.y), step)]

            def run(job: tuple[str, int, int], work: ConditionalDependence = work) -> Tensor:
                return torch.from_numpy(work.cross_edges(range(job[1], job[2])))

            scores[f"{pair.child}:edges"] = torch.cat(context.map_jobs(jobs, run), 1)
            scores[f"{pair.child}:sizes"] = torch.tensor(parts)
        return scores

    def pairs(self, graph: DependencyGraph) -> list[LayerPair]:
        """The pairs that are scored, in the order of the layers."""
        options = self.options

        def number(layer: Layer, filters: bool) -> tuple[int, bool]:
            own = of_glob(options.child_groups if filters else options.parent_groups, layer.name)
            return (options.groups, False) if own is None else (own, True)

        def wanted(name: str) -> bool:
            return not any(fnmatchcase(name, glob) for glob in options.skip)

        released = numbered_parents if self.has("numbered_parents") else None
        return layer_pairs(graph, wanted, number, options.taps == "consumed", released)

    def _estimator(self) -> CmiVariant:
        return CmiVariant(
            swapped_neighbour if self.has("swapped_neighbour") else spanning_tree.nearest,
            duplicates_unconnected if self.has("duplicates_unconnected") else spanning_tree.minimum_spanning_tree,
            edge_numbers if self.has("edge_numbers") else spanning_tree.cross_edges,
        )

    def _samples(self, context: base.ScoringContext) -> tuple[np.ndarray, np.ndarray]:
        """(n,) positions of the images that parents and that children are read on, in random order."""
        draw = with_replacement if self.has("with_replacement") else without_replacement
        share = independent_samples if self.has("independent_samples") else same_samples
        found = share(
            lambda name: sample_images(
                context.labels, self.options.samples_per_class, draw, context.generator("mint", name)
            )
        )
        if len(found[0]) < 6:
            raise PruneError(
                f"score.images: mint splits its images in thirds and needs at least 6, got {len(found[0])}"
            )
        return found

    def prunable(self, graph: DependencyGraph) -> DependencyGraph:
        """Groups whose channels no scored pair touches cannot be judged."""
        graph = super().prunable(graph)
        scored = {pair.child for pair in self.pairs(graph)}

        def reason(group: ChannelGroup) -> str:
            known = any(coupling.layer in scored for coupling in group.couplings)
            return "" if known else "no scored pair of layers touches its channels"

        return protect(graph, reason)

    @property
    def structured(self) -> bool:
        """Whether whole channels are asked for, not blocks."""
        return not self.options.p if self.options.structured is None else self.options.structured

    def check(self, graph: DependencyGraph, request: SelectionRequest) -> None:
        self._check_globs(graph)
        if self.structured:
            check_ranking(request)
            check_target(graph, request)
            return
        asked = [key for key in ("threshold", "keep_ratio", "counts", "target") if getattr(request, key) is not None]
        if asked:
            raise PruneError(
                f"mint: method.p masks blocks of weights and leaves the widths as they are: {' and '.join(asked)} "
                "cannot be asked for as well. Leave it out, or set method.structured=true to remove whole channels."
            )
        self._index(request)
        if not self._masked(graph):
            raise PruneError("mint: select.exclude and method.skip leave no layer whose blocks could be masked")

    def _check_globs(self, graph: DependencyGraph) -> None:
        """PruneError where a glob of the options speaks of no layer: it would be ignored."""
        children = [pair.child for pair in layer_pairs(graph, lambda name: True, lambda layer, _: (1, False), False)]
        layers = [name for name, layer in graph.layers.items() if layer.kind in ("conv", "linear")]
        named = {"skip": layers, "parent_groups": children, "child_groups": children, "caps": children}
        for key, names in named.items():
            for glob in getattr(self.options, key):
                if not any(fnmatchcase(name, glob) for name in names):
                    what = "layer" if key == "skip" else "layer that another one feeds (the child of a pair)"
                    raise PruneError(f"method.{key}: no {what} matches. {unknown('layer', glob, names)}")

    def _masked(self, graph: DependencyGraph) -> list[LayerPair]:
        """The pairs whose blocks may go: a layer that makes channels of an excluded group is left alone."""
        alone = {name for group in graph.groups if group.excluded for name in group.producers}
        return [pair for pair in self.pairs(graph) if pair.child not in alone]

    def _index(self, request: SelectionRequest) -> int:
        """Which value of the grid is asked for, from 0."""
        grid, index = self.options.p, request.index
        if not grid or any(not 0 < p <= 1 for p in grid):
            raise PruneError(f"method.p: quantiles of the scores, above 0 and up to 1, got {list(grid)}")
        if index is None and len(grid) > 1:
            raise PruneError(
                f"select.index: method.p has {len(grid)} values; choose the one to retrain, 1 to {len(grid)}. "
                "Runs that differ in it share one score file (score.from)."
            )
        if not 1 <= (index or 1) <= len(grid):
            raise PruneError(f"select.index: {index} is none of the {len(grid)} values of method.p, 1 to {len(grid)}")
        return (index or 1) - 1

    def select(self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest) -> Plan:
        graph = self.prunable(graph)
        self.check(graph, request)
        if not self.structured:
            return self._masking(scores, graph, request, self.options.p[self._index(request)])
        return super().select(scores, graph, request)

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        if not self.structured:
            return {}
        worth = {group.name: torch.zeros(group.width, dtype=torch.float64) for group in graph.free}
        for pair in self.pairs(graph):
            table = mutual_information(
                *(self.require_score(scores, f"{pair.child}:{what}") for what in ("edges", "sizes"))
            )
            sides = {"out": expand_groups(table.mean(1), pair.rows), "in": expand_groups(table.mean(0), pair.columns)}
            for group in graph.free:
                for coupling in group.couplings:
                    if coupling.layer == pair.child:
                        each = len(coupling.index) // group.width
                        values = torch.stack([sides[coupling.side][i] for i in coupling.index])
                        worth[group.name].index_add_(0, torch.tensor(coupling.channel), values / each)
        return worth

    def table(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> list[dict[str, Any]]:
        """What every value of the grid would cut, in percent of the weights of the scored layers and of all."""
        graph, rows = self.prunable(graph), []
        for number, p in enumerate(() if self.structured else self.options.p, start=1):
            counts = weights_left(self._masking(scores, graph, request, p), graph)
            scored = [counts[pair.child] for pair in self._masked(graph)]
            shares = (
                100 * (1 - sum(n for n, _ in part) / sum(n for _, n in part)) for part in (scored, counts.values())
            )
            rows.append({"index": number, "p": p, **dict(zip(("scored_percent", "all_percent"), shares, strict=True))})
        return rows

    def _masking(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest, p: float
    ) -> Plan:
        pairs = self._masked(graph)
        low = {pair.child: self._values(scores, pair) for pair in pairs}
        weights = {pair.child: block_sizes(pair, graph.layers[pair.child]) for pair in pairs}
        limit = global_threshold(list(low.values()), list(weights.values()), p, self.options.quantile)
        blocks = {}
        for pair in pairs:
            own = of_glob(self.options.caps, pair.child)
            cap = self.options.cap if own is None else own
            capped = distinct_cap if self.has("distinct_cap") else capped_threshold
            at = limit if cap is None else capped(low[pair.child], weights[pair.child], cap, limit)
            gone = low[pair.child] <= at
            if gone.any():
                blocks[pair.child] = WeightBlocks.of(pair.rows, pair.columns, [np.flatnonzero(row) for row in gone])
        why = {
            group.name: group.protected or "its channels stay; blocks of weights are masked" for group in graph.groups
        }
        plan = Plan({}, {group.name: group.width for group in graph.groups}, why, blocks)
        return promote_dead_channels(plan, graph, request) if self.options.promote else plan

    def _values(self, scores: Mapping[str, Tensor], pair: LayerPair) -> np.ndarray:
        """Integers in the order of the scores: minus the number of cross edges."""
        edges = self.require_score(scores, f"{pair.child}:edges")
        first = int(self.require_score(scores, f"{pair.child}:sizes")[0])
        return -(clamped_score(edges, first) if self.has("clamped_score") else edges).numpy()


def block_sizes(pair: LayerPair, layer: Layer) -> np.ndarray:
    """(child groups, parent groups) int64: weights in each block."""
    return np.outer([len(part) for part in pair.rows], [len(part) for part in pair.columns]) * layer.kernel


def expand_groups(means: Tensor, parts: Parts) -> dict[int, Tensor]:
    """Channel -> the value of its group."""
    return {channel: value for part, value in zip(parts, means, strict=True) for channel in part}


def of_glob(named: Mapping[str, T], layer: str) -> T | None:
    """The value of the first glob that matches."""
    return next((value for glob, value in named.items() if fnmatchcase(layer, glob)), None)


# What the released code does otherwise (section 2.3); each is a quirk of its name.


def independent_samples(take: Callable[[str], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Parents and children are read on images drawn independently of each other: the joint law is lost."""
    return take("parents"), take("children")


def with_replacement(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """An image may be drawn again."""
    return torch.randint(count, (wanted,), generator=generator)


def duplicates_unconnected(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The tree of a sparse matrix, where distance 0 is no edge."""
    return spanning_tree.minimum_spanning_tree(a, b, False)


def swapped_neighbour(table: np.ndarray) -> np.ndarray:
    """The neighbour in A of each row of B, taken as if it were a row of B: (|A|, |B|) -> (|A|,)."""
    return spanning_tree.nearest(np.ascontiguousarray(table.T))[: len(table)]


def edge_numbers(joined: np.ndarray, first: int) -> int:
    """Cross edges with an edge's number in the place of its row: edges in the order of (row, column), row < column.

    Which of the two equal entries of the symmetric matrix SciPy kept was up to its sort; here it is the upper one.
    """
    ends = np.stack([np.arange(len(joined)), joined], 1)[joined >= 0]
    ends.sort(1)
    columns = ends[np.lexsort((ends[:, 1], ends[:, 0])), 1]
    return int(((np.arange(len(columns)) < first) != (columns < first)).sum())


def clamped_score(edges: Tensor, first: int) -> Tensor:
    """R is at most |C|: no score below about 0."""
    return edges.clamp(max=first)


def numbered_parents(graph: DependencyGraph, layer: Layer) -> str | None:
    """The parent is the layer numbered before the child, whatever feeds it; None where that one is too narrow."""
    names = [n for n, found in graph.layers.items() if found.kind in ("conv", "linear")]
    before = names.index(layer.name) - 1
    return names[before] if before >= 0 and graph.layers[names[before]].width_out >= layer.width_in else None


def distinct_cap(values: np.ndarray, weights: np.ndarray, cap: float, limit: int) -> int:
    """Where ``cap`` of the blocks or more would go: entry round(cap U) of the pair's own U distinct values."""
    if (values <= limit).mean() < cap:
        return limit
    distinct = np.unique(values)
    return int(distinct[min(round(cap * len(distinct)), len(distinct) - 1)])

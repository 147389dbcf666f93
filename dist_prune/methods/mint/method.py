"""The method MINT: scores of blocks of weights, and the plan that masks the blocks with small scores.

Ganesh, Corso, Yasaei Sekeh: MINT: deep network compression via mutual information-based neuron trimming, ICPR 2020.
A pair is a layer (child) and the parent that feeds it, each in groups of neighbouring channels. A block is the weights
between a child group and a parent group.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dist_prune.errors import PruneError, unknown
from dist_prune.methods import base
from dist_prune.methods.mint import quirks, spanning_tree
from dist_prune.methods.mint.block_orders import ORDERS
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
from dist_prune.methods.mint.options import Options
from dist_prune.methods.mint.thresholds import capped_threshold, global_threshold
from dist_prune.methods.needs import Needs
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph, Layer
from dist_prune.pruning.hooks.activations import ChannelMeans
from dist_prune.pruning.plan.block_masks import weights_left
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.weight_blocks import WeightBlocks
from dist_prune.pruning.selection.group_scores import protect
from dist_prune.pruning.selection.ranking import SelectionRequest, check_ranking, check_target

T = TypeVar("T")


class Mint(base.RankingMethod):
    """Masks blocks of weights up to a quantile ``p`` of their scores, or removes channels by their summed scores."""

    paper = "Ganesh et al., MINT: deep network compression via mutual information-based neuron trimming, ICPR 2020"
    needs = Needs(labels=True, note="and the estimator")
    task_needs = ("class labels",)
    why_one_shot = "it masks blocks of weights, and layers whose blocks are masked already cannot be scored"
    Options = Options
    equivariant = False  # groups are made of neighbouring channels

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Count the cross edges of every block's spanning tree.

        Returns:
            For each child layer ``<layer>:edges``, (child groups, parent groups) int64, R of the spanning trees; and
            ``<layer>:sizes``, (2,) int64, |C| and |A|. ``mutual_information`` makes I of them. Plans compare the
            integers R, so equal scores are exactly equal. With another criterion ``<layer>:order`` instead, (child
            groups, parent groups) int64, positions of the blocks among all.
        """
        pairs = self.pairs(context.graph)
        if self.options.criterion != "information":
            orders = ORDERS[self.options.criterion](context, pairs)
            return {f"{child}:order": order for child, order in orders.items()}
        taps = {point.name: point for pair in pairs for point in (pair.below, pair.above)}
        tables = context.collect(list(taps.values()), ChannelMeans())
        means = {name: states["means"].double().numpy() for name, states in tables.items()}
        below, above = self._samples(context)
        parts, budget = split_sizes(len(below)), self.options.memory_mb * 2**20
        threads = worker_count(sum(parts), torch.get_num_threads(), budget)
        scores: base.Scores = {}
        for pair in pairs:  # the tables of one pair at a time
            x, y = means[pair.above.name][above], means[pair.below.name][below]
            dependence = ConditionalDependence(x, y, pair.x, pair.y, self._estimator(), threads)
            step = tile_size(sum(parts), len(pair.y), budget)
            jobs = [(pair.child, start, min(start + step, len(pair.y))) for start in range(0, len(pair.y), step)]

            def run(job: tuple[str, int, int], dependence: ConditionalDependence = dependence) -> Tensor:
                return torch.from_numpy(dependence.cross_edges(range(job[1], job[2])))

            scores[f"{pair.child}:edges"] = torch.cat(context.map_jobs(jobs, run), 1)
            scores[f"{pair.child}:sizes"] = torch.tensor(parts)
        return scores

    def pairs(self, graph: DependencyGraph) -> list[LayerPair]:
        """List the pairs that are scored, in the order of the layers."""
        options = self.options

        def group_count(layer: Layer, filters: bool) -> tuple[int, bool]:
            own = first_match(options.child_groups if filters else options.parent_groups, layer.name)
            return (options.groups, False) if own is None else (own, True)

        def is_scored(name: str) -> bool:
            return not any(fnmatchcase(name, glob) for glob in options.skip)

        released = quirks.numbered_parents if self.has("numbered_parents") else None
        return layer_pairs(graph, is_scored, group_count, options.taps == "consumed", released)

    def _estimator(self) -> CmiVariant:
        return CmiVariant(
            quirks.swapped_neighbour if self.has("swapped_neighbour") else spanning_tree.nearest,
            quirks.duplicates_unconnected
            if self.has("duplicates_unconnected")
            else spanning_tree.minimum_spanning_tree,
            quirks.edge_numbers if self.has("edge_numbers") else spanning_tree.cross_edges,
        )

    def _samples(self, context: base.ScoringContext) -> tuple[np.ndarray, np.ndarray]:
        """(n,) positions of the images on which parents and on which children are read, in random order."""
        draw = quirks.with_replacement if self.has("with_replacement") else without_replacement
        draw_both = quirks.independent_samples if self.has("independent_samples") else same_samples
        parents, children = draw_both(
            lambda name: sample_images(
                context.labels, self.options.samples_per_class, draw, context.generator("mint", name)
            )
        )
        if len(parents) < 6:
            raise PruneError(f"score.images: mint splits its images in thirds and needs at least 6, got {len(parents)}")
        return parents, children

    def prunable(self, graph: DependencyGraph) -> DependencyGraph:
        """Protect groups whose channels belong to no scored pair: they have no scores."""
        graph = super().prunable(graph)
        scored = {pair.child for pair in self.pairs(graph)}

        def reason(group: ChannelGroup) -> str:
            has_score = any(coupling.layer in scored for coupling in group.couplings)
            return "" if has_score else "no scored pair of layers touches its channels"

        return protect(graph, reason)

    @property
    def structured(self) -> bool:
        """Whether whole channels are removed, instead of masking blocks."""
        return not self.options.p if self.options.structured is None else self.options.structured

    def check(self, graph: DependencyGraph, request: SelectionRequest) -> None:
        self._check_globs(graph)
        if self.structured:
            check_ranking(request)
            check_target(graph, request)
            return
        keys = [key for key in ("threshold", "keep_ratio", "counts", "target") if getattr(request, key) is not None]
        if keys:
            raise PruneError(
                f"mint: method.p masks blocks of weights and leaves the widths as they are: {' and '.join(keys)} "
                "cannot be asked for as well. Leave it out, or set method.structured=true to remove whole channels."
            )
        self._index(request)
        if not self._masked(graph):
            raise PruneError("mint: select.exclude and method.skip leave no layer whose blocks could be masked")

    def _check_globs(self, graph: DependencyGraph) -> None:
        """PruneError if a glob of the options matches no layer: it would be ignored."""
        children = [pair.child for pair in layer_pairs(graph, lambda name: True, lambda layer, _: (1, False), False)]
        layers = [name for name, layer in graph.layers.items() if layer.kind in ("conv", "linear")]
        names_of = {"skip": layers, "parent_groups": children, "child_groups": children, "caps": children}
        for key, names in names_of.items():
            for glob in getattr(self.options, key):
                if not any(fnmatchcase(name, glob) for name in names):
                    what = "layer" if key == "skip" else "layer that another one feeds (the child of a pair)"
                    raise PruneError(f"method.{key}: no {what} matches. {unknown('layer', glob, names)}")

    def _masked(self, graph: DependencyGraph) -> list[LayerPair]:
        """The pairs whose blocks may be cut; layers that make channels of an excluded group keep all of theirs."""
        excluded = {name for group in graph.groups if group.excluded for name in group.producers}
        return [pair for pair in self.pairs(graph) if pair.child not in excluded]

    def _index(self, request: SelectionRequest) -> int:
        """The requested position in the grid ``p``, from 0."""
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
        """Sum the mean I of each channel's blocks: free group -> (C,) float64.

        A channel gets the mean over its row of blocks in a layer that makes it, and the mean over its column in a layer
        that reads it, summed over layers. If blocks are masked there is no ranking of channels: {}.
        """
        if not self.structured:
            return {}
        importance = {group.name: torch.zeros(group.width, dtype=torch.float64) for group in graph.free}
        for pair in self.pairs(graph):
            table = self._information(scores, pair)
            sides = {"out": expand_groups(table.mean(1), pair.rows), "in": expand_groups(table.mean(0), pair.columns)}
            for group in graph.free:
                for coupling in group.couplings:
                    if coupling.layer == pair.child:
                        each = len(coupling.index) // group.width
                        values = torch.stack([sides[coupling.side][i] for i in coupling.index])
                        importance[group.name].index_add_(0, torch.tensor(coupling.channel), values / each)
        return importance

    def table(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> list[dict[str, Any]]:
        """List for every value of the grid the share that it would cut, in percent.

        ``scored_percent`` is of the weights of the scored layers, ``all_percent`` of all weights.
        """
        graph, rows = self.prunable(graph), []
        for number, p in enumerate(() if self.structured else self.options.p, start=1):
            counts = weights_left(self._masking(scores, graph, request, p), graph)
            scored = [counts[pair.child] for pair in self._masked(graph)]
            shares = (
                100 * (1 - sum(left for left, _ in layers) / sum(dense for _, dense in layers))
                for layers in (scored, counts.values())
            )
            rows.append({"index": number, "p": p, **dict(zip(("scored_percent", "all_percent"), shares, strict=True))})
        return rows

    def _masking(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest, p: float
    ) -> Plan:
        pairs = self._masked(graph)
        values = {pair.child: self._values(scores, pair) for pair in pairs}
        weights = {pair.child: block_sizes(pair, graph.layers[pair.child]) for pair in pairs}
        limit = global_threshold(list(values.values()), list(weights.values()), p, self.options.quantile)
        blocks = {}
        for pair in pairs:
            own = first_match(self.options.caps, pair.child)
            cap = self.options.cap if own is None else own
            capped = quirks.distinct_cap if self.has("distinct_cap") else capped_threshold
            threshold = limit if cap is None else capped(values[pair.child], weights[pair.child], cap, limit)
            cut = values[pair.child] <= threshold
            if cut.any():
                blocks[pair.child] = WeightBlocks.of(pair.rows, pair.columns, [np.flatnonzero(row) for row in cut])
        reasons = {
            group.name: group.protected or "its channels stay; blocks of weights are masked" for group in graph.groups
        }
        plan = Plan({}, {group.name: group.width for group in graph.groups}, reasons, blocks)
        return promote_dead_channels(plan, graph, request) if self.options.promote else plan

    def _information(self, scores: Mapping[str, Tensor], pair: LayerPair) -> Tensor:
        """(child groups, parent groups) float64: I of the blocks, or their positions in another order, from 0."""
        if self.options.criterion != "information":
            return self.require_score(scores, f"{pair.child}:order").double()
        return mutual_information(*(self.require_score(scores, f"{pair.child}:{key}") for key in ("edges", "sizes")))

    def _values(self, scores: Mapping[str, Tensor], pair: LayerPair) -> np.ndarray:
        """Integers in the order of I, which falls as R rises: minus the number of cross edges."""
        if self.options.criterion != "information":
            return self.require_score(scores, f"{pair.child}:order").numpy()
        edges = self.require_score(scores, f"{pair.child}:edges")
        first = int(self.require_score(scores, f"{pair.child}:sizes")[0])
        return -(quirks.clamped_score(edges, first) if self.has("clamped_score") else edges).numpy()


def block_sizes(pair: LayerPair, layer: Layer) -> np.ndarray:
    """Count the weights in each block, (child groups, parent groups) int64."""
    return np.outer([len(row) for row in pair.rows], [len(column) for column in pair.columns]) * layer.kernel


def expand_groups(means: Tensor, parts: Parts) -> dict[int, Tensor]:
    """Give every channel the value of its group: (groups,) means -> channel -> ()."""
    return {channel: value for group, value in zip(parts, means, strict=True) for channel in group}


def first_match(values: Mapping[str, T], layer: str) -> T | None:
    """Look up the value of the first glob that matches a layer's name; None if none does."""
    return next((value for glob, value in values.items() if fnmatchcase(layer, glob)), None)

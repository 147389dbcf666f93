"""The method of entropy ranking: orders of deletion, and the plan that keeps the last channels of each order.

Interpretable deep model pruning, Neurocomputing 647 (2025) 130485. Layers are ranked independently of one another, on
the dense network.
"""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.methods import base
from dist_prune.methods.entropy.options import Options
from dist_prune.methods.needs import Needs
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.activations import (
    ActivationCensus,
    Activations,
    distinct,
    group_inputs,
    group_outputs,
    memory_batches,
)
from dist_prune.pruning.hooks.consumers import ChannelPoint
from dist_prune.pruning.information.backward_elimination import Elimination
from dist_prune.pruning.information.bandwidth import BandwidthGrid
from dist_prune.pruning.information.group_orders import EliminationScheduler
from dist_prune.pruning.information.group_samples import ALIGNED, EstimatorConfig, GroupSamples, batches_of
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.ranking import SelectionRequest, cost_share, first_true, top_k

SATURATED = 0.98  # share of log2 n from which on an entropy no longer tells filters apart
STEPS = 400  # points of the grid of ratios that ``l1_counts`` searches


class Entropy(base.RankingMethod):
    """Ranks filters by backward elimination with matrix-based Renyi entropies."""

    paper = "Interpretable deep model pruning, Neurocomputing 647 (2025) 130485"
    needs = Needs(labels=True, forward=2, note="and the estimator")
    task_needs = ("class labels",)
    Options = Options

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Find the order of deletion of every free group.

        Returns:
            For each free group of K channels: ``<group>:order``, (K,) int64, channels in the order of deletion;
            ``<group>:score``, (K,) float64, the criterion in bits at each deletion; ``<group>:joint``, (K,) float64,
            S(R) in bits before it (0 if a static order needs none); ``<group>:alone``, (K,) float64, H of each channel
            in bits, averaged over hook points; ``<group>:samples``, (1,) int64, images over which an entropy is taken:
            those of a batch, or with bins those of all batches.
        """
        view = {"augment": True} if self.has("augmented") else {}
        points_of = group_outputs if self.options.taps == "output" else group_inputs
        taps = {group.name: points_of(context.graph, group) for group in context.graph.free}
        points = {tap.point.name: tap.point for group_taps in taps.values() for tap in group_taps}
        census = context.collect(list(points.values()), ActivationCensus(), **view)
        shapes = {name: tuple(tables["shape"].tolist()) for name, tables in census.items()}
        statistic = Activations(shapes, self.options.map_side)
        batches = batches_of(context.images, self.options.batch, context.generator("entropy", "batches"))
        scores: base.Scores = {}
        for names in memory_batches(taps, statistic, context.images, len(batches[0]), self.options.memory_mb):
            read = {tap.point.name: tap.point for name in names for tap in taps[name]}
            maps = {s: t["maps"] for s, t in context.collect(list(read.values()), statistic, **view).items()}
            samples: list[GroupSamples] = []
            dead: list[list[int]] = []
            for name in names:
                chosen = [taps[name][i] for i in distinct([maps[tap.point.name] for tap in taps[name]])]
                activations = [tap.take(maps[tap.point.name]) for tap in chosen]
                config = self.estimator(name)
                samples.append(GroupSamples(name, activations, context.labels, batches, config, context.device))
                dead.append(self._dead_channels(chosen, census))
            scheduler = EliminationScheduler(
                context.map_jobs, context.checkpoint, partial(self.rule, context.graph), self.options.parallel
            )
            for group, ranked in zip(samples, scheduler.orders(samples, dead), strict=True):
                state = ranked.state
                scores[f"{group.name}:order"] = torch.tensor(state.order)
                scores[f"{group.name}:score"] = torch.tensor(state.scores, dtype=torch.float64)
                scores[f"{group.name}:joint"] = torch.tensor(state.joints, dtype=torch.float64)
                scores[f"{group.name}:alone"] = ranked.alone
                binned = group.estimator.binning
                scores[f"{group.name}:samples"] = torch.tensor([sum(map(len, batches)) if binned else group.n])
        return scores

    def estimator(self, group: str) -> EstimatorConfig:
        """Configure the entropy estimator of a group, by its name."""
        options = self.options
        resolved = options.resolved()
        kinds = (kind for glob, kind in options.by_layer.items() if fnmatchcase(group, glob))
        kind = next(kinds, resolved["estimator"])
        wick = options.sampling == "renyi_wick"
        grid = BandwidthGrid(0.1, 75, 50, 40) if wick else BandwidthGrid()
        wider = self.has("wider_kernel") and not wick
        width = resolved["width"]
        return EstimatorConfig(
            criterion=resolved["criterion"],
            binning=kind == "binning",
            alpha=resolved["alpha"],
            width=width,
            target=options.entropy_target,
            grid=grid._replace(coarse=options.grid == "coarse"),
            halved=width not in ALIGNED or wider,
            reference_halved=not wick,
            sigma_y=options.sigma_y,
            softmax=self.has("softmax_labels"),
            last_only=wick and self.has("last_batch"),
            edges=options.bins,
            low=options.bin_range[0],
            high=options.bin_range[1],
            wrapped=self.has("top_bin"),
            order_free=options.sigma_combine == "median",
            dtype=getattr(torch, options.precision),
        )

    def rule(self, graph: DependencyGraph, samples: GroupSamples) -> Elimination:
        """Build the rule by which filters of a group are deleted.

        Args:
            graph: of the dense network; the quirk ``conv_sign`` depends on the layer's kind.
            samples: the activations of the group.
        """
        options = self.options
        resolved = options.resolved()
        minus = options.sampling == "renyi" and self.has("conv_sign") and graph.layers[samples.name].kind == "conv"
        exhaustive = resolved["alpha"] in (2, 3, 4) or samples.estimator.binning
        return Elimination(options.combine, options.rev != minus, options.chunk, exhaustive)

    def _dead_channels(self, taps: Sequence[ChannelPoint], census: Mapping[str, Mapping[str, Tensor]]) -> list[int]:
        """Channels that are zero almost everywhere, in index order; at least one channel is left out of them."""
        if self.options.skip_zero is None:
            return []
        zeros = sum(census[tap.point.name]["zeros"][tap.positions].sum(1) for tap in taps)
        values = sum(int(census[tap.point.name]["numbers"]) * tap.positions.shape[1] for tap in taps)
        assert isinstance(zeros, Tensor)
        return [k for k, count in enumerate(zeros.tolist()) if count > self.options.skip_zero * values][
            : len(zeros) - 1
        ]

    def select(self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest) -> Plan:
        self.check(graph, request)
        if self.options.distribution == "l1" and request.target is not None:
            positions = self.importance(scores, graph)
            return Plan.from_kept(graph, top_k(graph, positions, l1_counts(graph, request), request.seed))
        return super().select(scores, graph, request)

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        """Read each channel's position in the order of deletion, from 1: free group -> (C,) float64."""
        return {
            group.name: rank_in_order(self.require_score(scores, f"{group.name}:order").tolist())
            for group in graph.free
        }

    def warnings(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> list[str]:
        """Report groups whose joint entropy is near its bound log2 n."""
        shares = {}
        for group in graph.free:
            n = int(self.require_score(scores, f"{group.name}:samples"))
            shares[group.name] = float(self.require_score(scores, f"{group.name}:joint").max()) / math.log2(n)
        high = {name: share for name, share in shares.items() if share > SATURATED}
        if not high:
            return []
        binned = {name: share for name, share in high.items() if self.estimator(name).binning}
        kernels = {name: share for name, share in high.items() if name not in binned}
        wider = "method.width=entropy_target (or a smaller method.entropy_target), or a larger method.batch"
        warnings = []
        for saturated, subject, cure in (
            (kernels, "kernels", wider),
            (binned, "bins", "fewer method.bins, or more score.images"),
        ):
            names = ", ".join(list(saturated)[:3]) + (" ..." if len(saturated) > 3 else "")
            if saturated:
                warnings.append(
                    f"in {len(saturated)} of {len(shares)} groups the entropy of what is left reaches "
                    f"{max(saturated.values()):.1%} of log2 n ({names}): the {subject} tell all samples apart whatever "
                    f"is deleted, and the order follows single entropies. Take {cure}."
                )
        return warnings


def l1_counts(graph: DependencyGraph, request: SelectionRequest) -> dict[str, int]:
    """Compute the channel counts of the released program's L1 baseline for a target.

    Every free group but the stem's keeps ceil(K (1 - r)) of its K channels, with the smallest r of a grid of 1/400 that
    meets the target. A residual stream to which the stem writes is the stem's group and stays whole.

    Args:
        graph: of the dense network.
        request: with a target; floors and rounding hold.

    Returns:
        Free group -> number of channels kept.

    Raises:
        PruneError: the target cannot be reached.
    """
    assert request.target is not None
    quantity, share = request.target
    stem = next(name for name, layer in graph.layers.items() if layer.kind == "conv")
    cut = [group for group in graph.free if stem not in group.producers]

    def counts(step: int) -> dict[str, int]:
        kept = {group.name: group.width for group in graph.free}
        return kept | {g.name: request.width(g, math.ceil(g.width * (STEPS - step) / STEPS)) for g in cut}

    result = counts(first_true(lambda step: cost_share(graph, quantity, counts(step)) <= share, STEPS))
    low = cost_share(graph, quantity, result)
    if low > share:
        raise PruneError(
            f"target.{quantity}: {share} cannot be reached with method.distribution=l1, which leaves the stem's group "
            f"whole: at least {low:.4f} stays. Raise the target, or take method.distribution=uniform."
        )
    return result


def rank_in_order(order: Sequence[int]) -> Tensor:
    """Compute each channel's position in an order of deletion, from 1: K channels -> (K,) float64."""
    positions = torch.zeros(len(order), dtype=torch.float64)
    positions[torch.tensor(list(order))] = torch.arange(1, len(order) + 1, dtype=torch.float64)
    return positions

"""One channel group as an elimination sees it: activations in batches, the kernel widths and judges they make."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.pruning.information import bandwidth, binned_estimator
from dist_prune.pruning.information.aligned_estimators import AlignedEstimator, PolynomialEstimator
from dist_prune.pruning.information.backward_elimination import UNITS_PER_BIT, EstimatorBank, MapJobs
from dist_prune.pruning.information.estimators import CHUNK, AdditiveEstimator, Criterion, EntropyEstimator
from dist_prune.pruning.information.renyi import distances, gaussian_kernel, label_kernel

Width = Literal[
    "entropy_target", "fix", "scale_rule_std", "median", "knn", "all", "remain", "aligned", "aligned_label", "label",
    "common_label", "polynomial",
]  # fmt: skip
ALIGNED = ("all", "remain", "aligned", "aligned_label", "label", "common_label")  # found by alignment, then smoothed


@dataclass(frozen=True)
class EstimatorConfig:
    """How entropies are estimated.

    Attributes:
        criterion: what is asked of a filter.
        binning: count bin tuples instead of using kernels.
        alpha: order of the Renyi entropy; 1: Shannon's.
        width: how kernel widths are found.
        target: entropy_target's share of log2 n.
        gamma: factor of the scaled rule.
        grid: of alignments.
        halved: kernels exp(-D^2 / 2 sigma^2); else exp(-D^2 / sigma^2).
        anchor_halved: the same of the kernel that widths are aligned to.
        sigma_y: width of the label kernel.
        softmax: a softmax of the one-hot labels, over the classes up to the largest label in the batch.
        last_only: only the last batch counts.
        edges, low, high, wrapped: of the bins; whether the lowest values wrap to that of what is above all edges.
        order_free: median of the batches' aligned widths instead of smoothing in their order.
        dtype: of the arithmetic.
    """

    criterion: Criterion = "mi_rest"
    binning: bool = False
    alpha: float = 1.01
    width: Width = "entropy_target"
    target: float = 0.75
    gamma: float = 1.0
    grid: bandwidth.BandwidthGrid = field(default_factory=bandwidth.BandwidthGrid)
    halved: bool = True
    reference_halved: bool = True
    sigma_y: float = 0.1
    softmax: bool = False
    last_only: bool = False
    edges: int = 30
    low: float = -1.0
    high: float = 1.0
    wrapped: bool = False
    order_free: bool = False
    dtype: torch.dtype = torch.float64

    def label_pairs(self, labels: Tensor) -> Tensor:
        """Pairs of the label kernel of one batch."""
        return label_kernel(labels, self.sigma_y, int(labels.max()) + 1 if self.softmax else 0)


@dataclass
class GroupSamples:
    """A group's activations.

    Attributes:
        name: of the group.
        taps: one (images, K, d) tensor each.
        labels: (images,).
        batches: positions of the images of each batch, all of one length.
        estimator: how entropies are estimated.
        device: where the arithmetic is done.
    """

    name: str
    taps: Sequence[Tensor]
    labels: Tensor
    batches: Sequence[Tensor]
    estimator: EstimatorConfig
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def width(self) -> int:
        return self.taps[0].shape[1]

    @property
    def n(self) -> int:
        return len(self.batches[0])

    @property
    def cost(self) -> float:
        """Of a complete order, in multiples of anything."""
        return float(self.width**2 * len(self.taps) * len(self.batches))

    def activations(self, tap: int, batch: int) -> Tensor:
        """(n, K, d) of one batch."""
        return self.taps[tap][self.batches[batch]].to(self.device)

    def squared(self, tap: int, batch: int, channels: Sequence[int]) -> Tensor:
        """(len, pairs) squared distances."""
        return distances(self.activations(tap, batch)[:, list(channels)].to(self.estimator.dtype))

    def squared_all(self, tap: int, batch: int) -> Tensor:
        """(pairs,) squared distances over all channels."""
        chunks = [range(i, min(i + CHUNK, self.width)) for i in range(0, self.width, CHUNK)]
        total = self.squared(tap, batch, chunks[0]).sum(0)
        for chunk in chunks[1:]:
            total += self.squared(tap, batch, chunk).sum(0)
        return total

    def label_pairs(self, batch: int) -> Tensor:
        """Pairs of the label kernel."""
        return self.estimator.label_pairs(self.labels[self.batches[batch]]).to(self.device, self.estimator.dtype)

    def reference_kernel(self, tap: int, batch: int) -> Tensor:
        """Pairs of the kernel of the whole unpruned layer, its width by the scaled rule (or aligned to the labels)."""
        total, config = self.squared_all(tap, batch), self.estimator
        if config.width == "aligned_label":
            sigma = float(
                bandwidth.align_bandwidths(total[None], self.label_pairs(batch), self.n, batch, config.grid)[0]
            )
        else:
            sigma = bandwidth.scaled_rule(self.n, self.taps[tap].shape[1] * self.taps[tap].shape[2], config.gamma)
        return gaussian_kernel(total, sigma, config.reference_halved)

    def batch_bandwidths(self, tap: int, batch: int) -> Tensor:
        """(K,) float64: the widths that one batch finds; of entropy_target, which needs them all, any batch's."""
        config, n, d = self.estimator, self.n, self.taps[tap].shape[2]
        same_for_all = partial(torch.full, (self.width,), dtype=torch.float64)
        if config.width in ("fix", "polynomial", "remain"):
            return same_for_all(bandwidth.scaled_rule(n, d, config.gamma))
        if config.width == "entropy_target":
            halves = [self.squared_all(tap, number) / 2 for number in range(len(self.batches))]
            return same_for_all(bandwidth.entropy_multiplier(halves, n, config.alpha, config.target) ** -0.5)
        if config.width == "scale_rule_std":
            deviation = self.activations(tap, batch).double().var(0, correction=0).mean(1).sqrt().cpu()
            return torch.where(deviation > 0, deviation, 1.0) * bandwidth.scaled_rule(n, d, config.gamma)
        if config.width == "common_label":
            total = self.squared_all(tap, batch)[None]
            return same_for_all(
                float(bandwidth.align_bandwidths(total, self.label_pairs(batch), n, batch, config.grid)[0])
            )
        chunks = [self.squared(tap, batch, range(i, min(i + CHUNK, self.width))) for i in range(0, self.width, CHUNK)]
        if config.width in ("median", "knn"):
            rule = bandwidth.median_bandwidth if config.width == "median" else bandwidth.nearest_neighbour_bandwidth
            return torch.cat([rule(chunk, n) for chunk in chunks]).cpu()
        reference = self.label_pairs(batch) if config.width == "label" else self.reference_kernel(tap, batch)
        return torch.cat(
            [bandwidth.align_bandwidths(chunk, reference, n, batch, config.grid) for chunk in chunks]
        ).cpu()

    def combine_bandwidths(self, per_batch: Sequence[Tensor]) -> Tensor:
        """One width per channel from those of the batches, in their order."""
        if self.estimator.width in ALIGNED and not self.estimator.order_free:
            return bandwidth.smooth_over_batches(per_batch)
        table = torch.stack(list(per_batch))
        return table.median(0).values if self.estimator.order_free else table.mean(0)

    def estimator_bank(
        self, sigmas: Sequence[Tensor], map_jobs: MapJobs | None = None, shards: int = 1
    ) -> EstimatorBank:
        """All judges, with (K,) widths for every tap."""
        config, batches = self.estimator, 1 if self.estimator.binning else len(self.batches)
        return EstimatorBank(
            self.width,
            len(self.taps),
            batches,
            lambda tap, batch, own: self._make_estimator(sigmas, tap, batch, own),
            map_jobs,
            shards,
            [batches - 1] if config.last_only else None,
            UNITS_PER_BIT[config.dtype],
            "filters"
            if config.width == "remain"
            else "remainders"
            if config.width in ("aligned", "aligned_label")
            else "fixed",
        )

    def _make_estimator(self, sigmas: Sequence[Tensor], tap: int, batch: int, own: list[int]) -> EntropyEstimator:
        config = self.estimator
        if config.binning:
            encode = binned_estimator.top_bin if config.wrapped else binned_estimator.bin_codes
            images = torch.cat(list(self.batches))
            bins = encode(self.taps[tap][images], config.edges, config.low, config.high)
            return binned_estimator.BinnedEstimator(bins, self.labels[images], config.criterion, own)
        x = self.activations(tap, batch)
        if config.width == "polynomial":
            return PolynomialEstimator(x.to(config.dtype), config.criterion, own, config.alpha)
        labels = self.label_pairs(batch) if config.criterion in ("relevance", "cmi_label") else None
        arguments = (x, sigmas[tap], config.criterion, own, config.alpha, labels, config.halved, config.dtype)
        if config.width in ("aligned", "aligned_label"):
            return AlignedEstimator(
                *arguments, reference=self.reference_kernel(tap, batch), batch=batch, grid=config.grid
            )
        estimator = AdditiveEstimator(*arguments)
        estimator.realigns, estimator.batch, estimator.grid = config.width == "remain", batch, config.grid
        return estimator


def batches_of(images: int, batch: int, generator: torch.Generator) -> list[Tensor]:
    """Positions of the images in each batch: a drawn permutation, cut; an incomplete last batch is dropped."""
    n = min(batch, images)
    if n < 2:
        raise PruneError(f"score.images: entropies need at least 2 images, got {images}")
    order = torch.randperm(images, generator=generator)
    return [order[i : i + n] for i in range(0, images - n + 1, n)]


def saturation(joint: float, n: int) -> float:
    """S(R) / log2 n: near 1 the kernels tell all samples apart, whatever is deleted."""
    return joint / math.log2(n)

"""Activations of one channel group in batches, with the bandwidths and estimators made from them."""

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
SEARCHED: dict[Width, Literal["filters", "remainders"]] = {  # in each step of an elimination
    "remain": "filters",
    "aligned": "remainders",
    "aligned_label": "remainders",
}
ALIGNED = (
    "all",
    "remain",
    "aligned",
    "aligned_label",
    "label",
    "common_label",
)  # by alignment, smoothed over batches


@dataclass(frozen=True)
class EstimatorConfig:
    """How entropies are estimated. Section numbers are those of the entropy specification.

    Attributes:
        criterion: score of a filter (section 4).
        binning: count bin tuples instead of using kernels.
        alpha: order of the Renyi entropy; 1: Shannon's.
        width: how bandwidths are found (section 3).
        target: entropy of the whole layer for ``entropy_target``, as a fraction of log2 n.
        gamma: factor of the scaled rule.
        grid: bandwidths that alignments try.
        halved: kernels exp(-D^2 / (2 sigma^2)); False: exp(-D^2 / sigma^2).
        reference_halved: the same for the reference kernel of alignments.
        sigma_y: bandwidth of the label kernel.
        softmax: softmax of the one-hot labels, over the classes up to the largest label in the batch.
        last_only: only the last batch counts.
        edges: number of equally spaced edges of the bins.
        low: first edge.
        high: last edge.
        wrapped: use ``top_bin``, in which the lowest values share a code with values above all edges.
        order_free: median of the aligned bandwidths over batches, instead of smoothing in their order.
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
        """Pairs of the label kernel of one batch.

        Args:
            labels: (n,) int64 class numbers.

        Returns:
            (n (n - 1) / 2,) float64.
        """
        return label_kernel(labels, self.sigma_y, int(labels.max()) + 1 if self.softmax else 0)


@dataclass
class GroupSamples:
    """Activations of one group, and the estimators of its entropies.

    Attributes:
        name: of the group.
        taps: (images, K, d) activations at each hook point, of all images on every rank.
        labels: (images,) int64 class numbers.
        batches: (n,) int64 positions of the images of each batch, all of one length.
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
        """Number K of channels."""
        return self.taps[0].shape[1]

    @property
    def n(self) -> int:
        """Number of images of a batch."""
        return len(self.batches[0])

    @property
    def cost(self) -> float:
        """Relative cost of a complete order, to balance groups over ranks."""
        return float(self.width**2 * len(self.taps) * len(self.batches))

    def activations(self, tap: int, batch: int) -> Tensor:
        """Activations of one batch at one hook point: (n, K, d)."""
        return self.taps[tap][self.batches[batch]].to(self.device)

    def squared(self, tap: int, batch: int, channels: Sequence[int]) -> Tensor:
        """(len(channels), pairs) squared distances of single channels."""
        return distances(self.activations(tap, batch)[:, list(channels)].to(self.estimator.dtype))

    def squared_all(self, tap: int, batch: int) -> Tensor:
        """(pairs,) squared distances over all channels."""
        chunks = [range(i, min(i + CHUNK, self.width)) for i in range(0, self.width, CHUNK)]
        total = self.squared(tap, batch, chunks[0]).sum(0)
        for chunk in chunks[1:]:
            total += self.squared(tap, batch, chunk).sum(0)
        return total

    def label_pairs(self, batch: int) -> Tensor:
        """(pairs,) of the label kernel of one batch, on the device."""
        return self.estimator.label_pairs(self.labels[self.batches[batch]]).to(self.device, self.estimator.dtype)

    def reference_kernel(self, tap: int, batch: int) -> Tensor:
        """(pairs,) of the kernel of the whole unpruned layer (section 3.2).

        Its bandwidth is that of the scaled rule, or for ``aligned_label`` aligned to the label kernel.
        """
        total, config = self.squared_all(tap, batch), self.estimator
        if config.width == "aligned_label":
            sigma = float(
                bandwidth.align_bandwidths(total[None], self.label_pairs(batch), self.n, batch, config.grid)[0]
            )
        else:
            sigma = bandwidth.scaled_rule(self.n, self.taps[tap].shape[1] * self.taps[tap].shape[2], config.gamma)
        return gaussian_kernel(total, sigma, config.reference_halved)

    def batch_bandwidths(self, tap: int, batch: int) -> Tensor:
        """Find the bandwidths of one batch.

        Args:
            tap: number of the hook point.
            batch: number of the batch. ``entropy_target`` uses all batches, and finds the same for each.

        Returns:
            (K,) float64, on the CPU.
        """
        config = self.estimator
        n = self.n
        d = self.taps[tap].shape[2]
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
        """Combine the bandwidths of all batches to one for each channel.

        Args:
            per_batch: (K,) float64 of each batch, in their order.

        Returns:
            (K,) float64: smoothed, median or mean over the batches.
        """
        if self.estimator.width in ALIGNED and not self.estimator.order_free:
            return bandwidth.smooth_over_batches(per_batch)
        table = torch.stack(list(per_batch))
        return table.median(0).values if self.estimator.order_free else table.mean(0)

    def estimator_bank(
        self, sigmas: Sequence[Tensor], map_jobs: MapJobs | None = None, shards: int = 1
    ) -> EstimatorBank:
        """Make the estimators of the group.

        Args:
            sigmas: (K,) bandwidths for each hook point.
            map_jobs: see ``EstimatorBank``.
            shards: see ``EstimatorBank``.
        """
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
            SEARCHED.get(config.width, "fixed"),
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
        estimator.realigns = config.width == "remain"
        estimator.batch = batch
        estimator.grid = config.grid
        return estimator


def batches_of(images: int, batch: int, generator: torch.Generator) -> list[Tensor]:
    """Draw the batches.

    Args:
        images: number of images.
        batch: images of a batch; at most ``images`` are taken.
        generator: decides the permutation; seeded alike on all ranks.

    Returns:
        (n,) int64 positions of the images of each batch. An incomplete last batch is dropped.

    Raises:
        PruneError: there are fewer than 2 images.
    """
    n = min(batch, images)
    if n < 2:
        raise PruneError(f"score.images: entropies need at least 2 images, got {images}")
    order = torch.randperm(images, generator=generator)
    return [order[i : i + n] for i in range(0, images - n + 1, n)]


def saturation(joint: float, n: int) -> float:
    """S(R) / log2 n: near 1 the kernels tell all samples apart, whichever filters are removed (section 9)."""
    return joint / math.log2(n)

"""HRel: mutual information between a filter's activation maps and the class labels.

Sarvani et al.: HRel, Neural Networks 147 (2022): relevance between activation maps and class labels:

    s_k = mean over batches of I(Z_k; Y),    I(Z; Y) = S(A_Z) + S(A_Y) - S(A_Z o A_Y)

A are the Gram matrices of a batch's maps and of its labels, normalised to trace 1 (the product o too), and S is the
matrix-based Renyi entropy of order ``alpha`` in bits. One pass over the unpruned network scores every filter by itself.
It needs calibration images and their labels; no gradients.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_prune.methods import base
from dist_prune.methods.needs import Needs
from dist_prune.pruning.hooks.activations import ActivationCensus, Activations, distinct, group_inputs, memory_batches
from dist_prune.pruning.information.bandwidth import BandwidthGrid
from dist_prune.pruning.information.group_orders import group_bandwidths
from dist_prune.pruning.information.group_samples import EstimatorConfig, GroupSamples, batches_of


class Options(base.RankingOptions):
    """Options of HRel.

    Kernels of maps are exp(-D^2 / sigma^2). Their bandwidth sigma maximises the alignment with the label kernel of each
    batch, and is smoothed over the batches.

    Attributes:
        alpha: order of the Renyi entropy.
        batch: images whose Gram matrix is computed together.
        sigma_y: bandwidth of the kernel of the one-hot labels.
        grid: how many bandwidths the alignment tries.
        map_side: largest side of the maps; larger ones are averaged to it.
        precision: dtype of kernels and eigenvalues.
        memory_mb: memory for activations that are held at a time.
    """

    alpha: float = Field(
        default=1.0, gt=0, le=1000, description="order of the Renyi entropy; 1: Shannon's, as in the paper"
    )
    batch: int = Field(default=100, ge=2, le=65536, description="images per Gram matrix")
    sigma_y: float = Field(default=0.1, gt=0, le=10**9, description="bandwidth of the kernel of the one-hot labels")
    grid: Literal["fine", "coarse"] = Field(
        default="fine", description="bandwidths that the alignment tries: 300, or twice 16"
    )
    map_side: int | None = Field(
        default=None, ge=1, le=16384, description="side in pixels that larger maps are averaged to; none: as they are"
    )
    precision: Literal["float64", "float32"] = Field(
        default="float64", description="floating-point type of kernels and eigenvalues"
    )
    memory_mb: int = Field(
        default=4096, ge=16, le=10**9, description="MiB of activations held at a time; changes no score"
    )


class HRel(base.RankingMethod):
    """Filters whose maps tell least about the classes go first.

    On a residual stream the mutual information is averaged over the layers that read it.
    """

    paper = "Sarvani et al., Neural Networks 2022: relevance of activation maps to the classes (HRel)"
    needs = Needs(labels=True, forward=2, note="and the estimator")
    task_needs = ("class labels",)
    Options = Options

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Estimate the mutual information at the inputs of the layers that read each group.

        Returns:
            ``<group>``: (C,) float64, bits.
        """
        inputs = {group.name: group_inputs(context.graph, group) for group in context.graph.free}
        points = {point.point.name: point.point for own in inputs.values() for point in own}
        shapes = {
            name: tuple(tables["shape"].tolist())
            for name, tables in context.collect(list(points.values()), ActivationCensus()).items()
        }
        statistic = Activations(shapes, self.options.map_side)
        batches = batches_of(context.images, self.options.batch, context.generator("hrel", "batches"))
        scores = {}
        for names in memory_batches(inputs, statistic, context.images, len(batches[0]), self.options.memory_mb):
            points = {point.point.name: point.point for name in names for point in inputs[name]}
            tables = context.collect(list(points.values()), statistic)
            maps = {name: own["maps"] for name, own in tables.items()}
            group_samples = []
            for name in names:
                chosen = [inputs[name][i] for i in distinct([maps[point.point.name] for point in inputs[name]])]
                samples = [point.take(maps[point.point.name]) for point in chosen]
                group_samples.append(
                    GroupSamples(name, samples, context.labels, batches, self.estimator(), context.device)
                )
            scores |= self._relevances(context, group_samples)
        return scores

    def estimator(self) -> EstimatorConfig:
        """The configuration of entropies and bandwidths that the options describe."""
        options = self.options
        return EstimatorConfig(
            criterion="relevance",
            alpha=options.alpha,
            width="label",
            grid=BandwidthGrid(coarse=options.grid == "coarse"),
            halved=False,
            sigma_y=options.sigma_y,
            dtype=getattr(torch, options.precision),
        )

    def _relevances(self, context: base.ScoringContext, group_samples: list[GroupSamples]) -> base.Scores:
        """One job per group, input and batch; rounded values are added as integers, whichever rank computed them."""
        bandwidths = group_bandwidths(group_samples, context.map_jobs)
        banks = [samples.estimator_bank(own) for samples, own in zip(group_samples, bandwidths, strict=True)]
        jobs = [
            (samples.name, number, tap, batch)
            for number, samples in enumerate(group_samples)
            for tap in range(len(samples.taps))
            for batch in range(len(samples.batches))
        ]

        def run(job: tuple[str, int, int, int]) -> Tensor:
            _, number, tap, batch = job
            relevance = banks[number].estimator(tap, batch).relevance(range(group_samples[number].width))
            return (relevance * banks[number].unit).round().long()

        totals: dict[str, Tensor] = {}
        results = context.map_jobs(jobs, run, costs=[float(group_samples[number].width) for _, number, _, _ in jobs])
        for (name, number, _, _), result in zip(jobs, results, strict=True):
            totals[name] = totals.get(name, torch.zeros(group_samples[number].width, dtype=torch.int64)) + result
        divisors = {
            samples.name: bank.unit * len(samples.taps) * len(samples.batches)
            for samples, bank in zip(group_samples, banks, strict=True)
        }
        return {name: total.double() / divisors[name] for name, total in totals.items()}

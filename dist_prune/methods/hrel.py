"""Filters whose maps tell least about the classes go first: I(Z_k; Y) by matrix-based Renyi entropies.

HRel: Sarvani et al., Neural Networks 147 (2022): relevance between activation maps and class labels. One pass over the
unpruned network; filters are judged each by itself.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_prune.methods import base
from dist_prune.pruning.hooks.activations import ActivationCensus, Activations, distinct, group_inputs, memory_batches
from dist_prune.pruning.information.bandwidth import BandwidthGrid
from dist_prune.pruning.information.group_orders import group_bandwidths
from dist_prune.pruning.information.group_samples import EstimatorConfig, GroupSamples, batches_of


class Options(base.RankingOptions):
    """Kernels exp(-D^2 / sigma^2); sigma of maps is aligned to each batch's label kernel, and smoothed over batches."""

    alpha: float = Field(default=1.0, gt=0, le=1000, description="order of the entropy; 1 is Shannon's, the paper's")
    batch: int = Field(default=100, ge=2, le=65536, description="images whose entropies are taken together")
    sigma_y: float = Field(default=0.1, gt=0, le=10**9, description="width of the kernel of the one-hot labels")
    grid: Literal["fine", "coarse"] = Field(default="fine", description="alignment: 300 widths, or twice 16")
    map_side: int | None = Field(default=None, ge=1, le=16384, description="average larger maps to this side first")
    precision: Literal["float64", "float32"] = Field(default="float64", description="of kernels and spectra")
    memory_mb: int = Field(default=4096, ge=16, le=10**9, description="for activations held at a time; moves no score")


class HRel(base.RankingMethod):
    """The mean of I(Z_k; Y) over batches and, on a residual stream, over the places where it is read."""

    paper = "Sarvani et al., Neural Networks 2022: relevance of activation maps to the classes (HRel)"
    Options = Options

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Group -> (K,) float64, bits. What enters the layers behind norm, activation and sum is read."""
        taps = {group.name: group_inputs(context.graph, group) for group in context.graph.free}
        points = {tap.point.name: tap.point for found in taps.values() for tap in found}
        shapes = {
            name: tuple(t["shape"].tolist())
            for name, t in context.collect(list(points.values()), ActivationCensus()).items()
        }
        statistic = Activations(shapes, self.options.map_side)
        batches = batches_of(context.images, self.options.batch, context.generator("hrel", "batches"))
        scores = {}
        for names in memory_batches(taps, statistic, context.images, len(batches[0]), self.options.memory_mb):
            held = {tap.point.name: tap.point for name in names for tap in taps[name]}
            maps = {site: t["maps"] for site, t in context.collect(list(held.values()), statistic).items()}
            subjects = []
            for name in names:
                chosen = [taps[name][i] for i in distinct([maps[tap.point.name] for tap in taps[name]])]
                found = [tap.take(maps[tap.point.name]) for tap in chosen]
                subjects.append(GroupSamples(name, found, context.labels, batches, self.estimator(), context.device))
            scores |= self._relevances(context, subjects)
        return scores

    def estimator(self) -> EstimatorConfig:
        """How entropies and widths are found."""
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
        """A job a batch and tap; rounded values are added as integers, wherever they were computed."""
        sigmas = group_bandwidths(group_samples, context.map_jobs)
        panels = [samples.estimator_bank(own) for samples, own in zip(group_samples, sigmas, strict=True)]
        jobs = [
            (samples.name, number, tap, batch)
            for number, samples in enumerate(group_samples)
            for tap in range(len(samples.taps))
            for batch in range(len(samples.batches))
        ]

        def run(job: tuple[str, int, int, int]) -> Tensor:
            _, number, tap, batch = job
            found = panels[number].estimator(tap, batch).relevance(range(group_samples[number].width))
            return (found * panels[number].unit).round().long()

        out: dict[str, Tensor] = {}
        parts = context.map_jobs(jobs, run, costs=[float(group_samples[number].width) for _, number, _, _ in jobs])
        for (name, number, _, _), part in zip(jobs, parts, strict=True):
            out[name] = out.get(name, torch.zeros(group_samples[number].width, dtype=torch.int64)) + part
        means = {
            s.name: bank.unit * len(s.taps) * len(s.batches) for s, bank in zip(group_samples, panels, strict=True)
        }
        return {name: total.double() / means[name] for name, total in out.items()}

"""Filters whose maps tell least about the classes go first: I(Z_k; Y) by matrix-based Renyi entropies.

HRel: Sarvani et al., Neural Networks 147 (2022): relevance between activation maps and class labels. One pass over the
unpruned network; filters are judged each by itself.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_prune.methods import method
from dist_prune.pruning.activations import Activations, Census, bundles, distinct, taps_of
from dist_prune.pruning.ranking import widths_of
from dist_prune.pruning.subjects import Estimator, Subject, batches_of
from dist_prune.pruning.widths import Grid


class Options(method.RankingOptions):
    """Kernels exp(-D^2 / sigma^2); sigma of maps is aligned to each batch's label kernel, and smoothed over batches."""

    alpha: float = Field(default=1.0, gt=0, le=1000, description="order of the entropy; 1 is Shannon's, the paper's")
    batch: int = Field(default=100, ge=2, le=65536, description="images whose entropies are taken together")
    sigma_y: float = Field(default=0.1, gt=0, le=10**9, description="width of the kernel of the one-hot labels")
    grid: Literal["fine", "coarse"] = Field(default="fine", description="alignment: 300 widths, or twice 16")
    map_side: int | None = Field(default=None, ge=1, le=16384, description="average larger maps to this side first")
    precision: Literal["float64", "float32"] = Field(default="float64", description="of kernels and spectra")
    memory_mb: int = Field(default=4096, ge=16, le=10**9, description="for activations held at a time; moves no score")


class HRel(method.Ranking):
    """The mean of I(Z_k; Y) over batches and, on a residual stream, over the places where it is read."""

    paper = "Sarvani et al., Neural Networks 2022: relevance of activation maps to the classes (HRel)"
    Options = Options

    def score(self, bench: method.Bench) -> method.Scores:
        """Group -> (K,) float64, bits. What enters the layers behind norm, activation and sum is read."""
        taps = {group.name: taps_of(bench.channels, group) for group in bench.channels.free}
        sites = {tap.site.name: tap.site for found in taps.values() for tap in found}
        shapes = {name: tuple(t["shape"].tolist()) for name, t in bench.observe(list(sites.values()), Census()).items()}
        statistic = Activations(shapes, self.options.map_side)
        batches = batches_of(bench.images, self.options.batch, bench.draw("hrel", "batches"))
        scores = {}
        for names in bundles(taps, statistic, bench.images, len(batches[0]), self.options.memory_mb):
            held = {tap.site.name: tap.site for name in names for tap in taps[name]}
            maps = {site: t["maps"] for site, t in bench.observe(list(held.values()), statistic).items()}
            subjects = []
            for name in names:
                chosen = [taps[name][i] for i in distinct([maps[tap.site.name] for tap in taps[name]])]
                found = [tap.take(maps[tap.site.name]) for tap in chosen]
                subjects.append(Subject(name, found, bench.labels, batches, self.estimator(), bench.device))
            scores |= self._relevances(bench, subjects)
        return scores

    def estimator(self) -> Estimator:
        """How entropies and widths are found."""
        options = self.options
        return Estimator(
            criterion="relevance", alpha=options.alpha, width="label", grid=Grid(coarse=options.grid == "coarse"),
            halved=False, sigma_y=options.sigma_y, dtype=getattr(torch, options.precision),
        )  # fmt: skip

    def _relevances(self, bench: method.Bench, subjects: list[Subject]) -> method.Scores:
        """A job a batch and tap; rounded values are added as integers, wherever they were computed."""
        sigmas = widths_of(subjects, bench.share)
        panels = [subject.panel(own) for subject, own in zip(subjects, sigmas, strict=True)]
        jobs = [
            (subject.name, number, tap, batch)
            for number, subject in enumerate(subjects)
            for tap in range(len(subject.taps))
            for batch in range(len(subject.batches))
        ]

        def run(job: tuple[str, int, int, int]) -> Tensor:
            _, number, tap, batch = job
            found = panels[number].judge(tap, batch).relevance(range(subjects[number].width))
            return (found * panels[number].unit).round().long()

        out: dict[str, Tensor] = {}
        parts = bench.share(jobs, run, costs=[float(subjects[number].width) for _, number, _, _ in jobs])
        for (name, number, _, _), part in zip(jobs, parts, strict=True):
            out[name] = out.get(name, torch.zeros(subjects[number].width, dtype=torch.int64)) + part
        means = {s.name: panel.unit * len(s.taps) * len(s.batches) for s, panel in zip(subjects, panels, strict=True)}
        return {name: total.double() / means[name] for name, total in out.items()}

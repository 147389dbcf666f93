"""The method of Shapley values: accuracies without sets of channels, and the plan that removes the smallest values.

Ancona, Oztireli, Gross: Shapley value as principled metric for structured network pruning, 2020 (permutations);
Adamczewski, Li, Van Gool: Shapley Pruning for Neural Network Compression, 2024 (regression, partial sums). Players are
the channels of one group, other groups are whole. A channel is off in the game as it is after surgery: zero where it
is consumed. Accuracy is in percent.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from dist_prune.methods import base
from dist_prune.methods.needs import Needs
from dist_prune.methods.shapley import estimators, quirks
from dist_prune.methods.shapley.options import Options
from dist_prune.pruning.figure_data import Curve
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.gating import Where
from dist_prune.pruning.selection.ranking import SelectionRequest

ORACLE = range(1, 6)  # sizes of the sets that the exhaustive check compares
DIGITS = 9  # decimals of values in percent when they are compared


class Shapley(base.RankingMethod):
    """Removes the channels with the smallest estimated Shapley values of accuracy."""

    paper = "Adamczewski, Li, Van Gool, Shapley Pruning for Neural Network Compression, 2024"
    needs = Needs(labels=True, forward=None, note="grows with the number of channels")
    task_needs = ("class logits",)
    Options = Options
    equivariant = False  # coalitions are drawn by channel number

    @property
    def calibration_split(self) -> Literal["train", "held_out", "test"]:
        """The split on which accuracies are measured: held-out training images, unless a quirk takes others."""
        if self.has("test_images"):
            return quirks.test_images()
        return quirks.training_images() if self.has("training_images") else "held_out"

    @property
    def augmented(self) -> bool:
        """Whether accuracies are measured on augmented images (a quirk)."""
        return quirks.augmented_images() if self.has("augmented_images") else False

    @property
    def where(self) -> Where:
        """The tensors in which channels are switched off; see ``gate_points``."""
        return quirks.raw_outputs() if self.has("raw_outputs") else "consumed"

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Count the images that the network gets right without each sampled set of channels.

        Returns:
            For each free group ``<group>:ends``, (3,) int64: images right with every channel, with none, and all
            images. Estimators kernel and combin: ``<group>:off``, (n, C) uint8, 1 for a channel that is off, and
            ``<group>:correct``, (n,) int64. Permutation: ``<group>:orders``, (P, C) int32, orders of removal, and
            ``<group>:correct``, (P, C - 1) int64, after each removal but the last.
        """
        options = self.options
        widths = {group.name: group.width for group in context.graph.free}

        def run(job: tuple[str, str, int]) -> list[int]:
            kind, group, block = job
            off = self._block(context, kind, group, widths[group], block)
            return context.count_correct(group, off, where=self.where, memory_mb=options.memory_mb)

        def count_all(jobs: list[tuple[str, str, int]]) -> list[list[int]]:
            return context.map_jobs(jobs, run, keep="shapley")

        ends = count_all([("ends", name, 0) for name in widths])
        scores: base.Scores = {
            f"{name}:ends": torch.tensor([*counts, context.images]) for name, counts in zip(widths, ends, strict=True)
        }
        unreliable = list(widths)
        for samples in self._sample_counts():
            spans = {name: self._evaluation_count(widths[name], samples) for name in unreliable}
            jobs = [
                (options.estimator, name, block)
                for name, count in spans.items()
                for block in range(-(-count // options.stack))
            ]
            correct: dict[str, list[int]] = {name: [] for name in unreliable}
            for (_, name, _), counts in zip(jobs, count_all(jobs), strict=True):
                correct[name] += counts
            for name in unreliable:
                right = torch.tensor(correct[name][: spans[name]])
                scores |= self._scores_of(context, name, widths[name], samples, right)
            unreliable = [name for name in unreliable if self._estimate(scores, name)[2] < options.reliability]
        return scores

    def check(self, graph: DependencyGraph, request: SelectionRequest) -> None:
        super().check(graph, request)
        if self.options.estimator == "combin":
            for group in graph.free:
                self._evaluation_count(group.width, 0)

    def cautions(self, graph: DependencyGraph) -> list[str]:
        """Warn of numbers of samples near the number of a regression's unknowns."""
        if self.options.estimator != "kernel":
            return []
        samples, widths = self.options.samples, sorted({group.width for group in graph.free})
        close = [width for width in widths if estimators.near_threshold(samples, width)]
        if not close:
            return []
        names = [group.name for group in graph.free if group.width in close]
        advice = estimators.samples_clear_of_threshold(widths, 2 * estimators.unknown_count(close[-1]))
        shown = ", ".join(names[:3]) + (f", ... {len(names)} groups" if len(names) > 3 else "")
        return [
            f"method.samples: {samples} random sets are about as many as the regression has unknowns for "
            f"{' or '.join(map(str, close))} channels (a value each and the intercept; {shown}). That is the worst "
            "number there is: the values follow the noise, and far fewer sets rank better. Take "
            f"method.samples={advice}, or method.estimator=permutation."
        ]

    def _sample_counts(self) -> list[int]:
        """Numbers of samples after which the rankings are checked; the last one is all of them."""
        most = self.options.samples
        if self.options.until == "samples" or self.options.estimator == "combin":
            return [most]
        return [n for n in (8 * 2**i for i in range(32)) if n < most] + [most]

    def _evaluation_count(self, width: int, samples: int) -> int:
        if self.options.estimator == "combin":
            return estimators.subset_count(width, estimators.sizes_of(width, self.options.k, self.options.adding))
        return samples * (width - 1) if self.options.estimator == "permutation" else samples

    def _draw(self, context: base.ScoringContext, group: str) -> estimators.Draw:
        return lambda number: context.generator("shapley", self.options.estimator, group, number)

    def _block(self, context: base.ScoringContext, kind: str, group: str, width: int, block: int) -> Tensor:
        """(m, C) bool: the sets of a job. Blocks are always full, so that they stay the same with more samples."""
        start = block * self.options.stack
        stop = start + self.options.stack
        if kind == "ends":
            return torch.tensor([[False] * width, [True] * width])
        if kind == "combin":
            return estimators.subsets(width, estimators.sizes_of(width, self.options.k, self.options.adding))[
                start:stop
            ]
        sets_of: Callable[..., Tensor] = estimators.random_sets if kind == "kernel" else estimators.permutation_prefixes
        return sets_of(width, start, stop, self._draw(context, group))

    def _scores_of(
        self, context: base.ScoringContext, name: str, width: int, samples: int, correct: Tensor
    ) -> base.Scores:
        """The sampled sets or orders of a group and their counts, as they enter the score file."""
        draw = self._draw(context, name)
        if self.options.estimator == "permutation":
            orders = estimators.random_permutations(width, samples, draw)
            return {f"{name}:orders": orders, f"{name}:correct": correct.view(samples, width - 1)}
        if self.options.estimator == "kernel":
            off = estimators.random_sets(width, 0, samples, draw)
        else:
            off = estimators.subsets(width, estimators.sizes_of(width, self.options.k, self.options.adding))
        return {f"{name}:off": off.to(torch.uint8), f"{name}:correct": correct}

    def _estimate(
        self, scores: Mapping[str, Tensor], name: str, first: int | None = None
    ) -> tuple[Tensor, Tensor | None, float]:
        """(C,) values in percent, their standard errors if they are known, and the reliability of the ranking.

        ``first``: number of samples that are used; None: all.
        """
        correct = self.require_score(scores, f"{name}:correct")[:first]
        full_count, empty_count, images = self.require_score(scores, f"{name}:ends").tolist()
        accuracy = 100 * correct.double() / images
        full = 100 * full_count / images
        empty = 100 * empty_count / images
        errors: Tensor | None = None
        if self.options.estimator == "permutation":
            steps = estimators.marginal_losses(
                self.require_score(scores, f"{name}:orders")[:first], accuracy, full, empty
            )
            values = steps.mean(0)
            errors = steps.std(0) / len(steps) ** 0.5 if len(steps) > 1 else None
        elif self.options.estimator == "kernel":
            off = self.require_score(scores, f"{name}:off")[:first].bool()
            values, errors = estimators.least_squares(off, accuracy)
            if self.options.kernel == "shap":
                values = estimators.kernel_shap(off, accuracy, full, empty)
        else:
            off = self.require_score(scores, f"{name}:off").bool()
            sizes = estimators.sizes_of(off.shape[1], self.options.k, self.options.adding)
            values = estimators.values_by_size(off, accuracy, sizes)
        return values, errors, estimators.reliability(values, errors)

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        """Estimate the Shapley value of each channel: free group -> (C,) float64, percent."""
        # values of channels that no set tells apart differ in a solver's last bits, which depend on the processor
        return {g.name: self._estimate(scores, g.name)[0].round(decimals=DIGITS) for g in graph.free}

    def table(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> list[dict[str, Any]]:
        """List the samples, accuracies and reliability of each group's ranking.

        ``full`` and ``empty`` are accuracies with every and with no channel, in percent. ``oracle_<n>`` is the share of
        the best n channels to remove together (with ``adding``: to keep) that the values rank first; it is given if
        every set of that size was evaluated.
        """
        rows = []
        for group in graph.free:
            values, _, reliable = self._estimate(scores, group.name)
            correct = self.require_score(scores, f"{group.name}:correct")
            full, empty, images = self.require_score(scores, f"{group.name}:ends").tolist()
            row: dict[str, Any] = {
                "group": group.name,
                "samples": len(correct),
                "full": 100 * full / images,
                "empty": 100 * empty / images,
                "reliability": reliable,
            }
            if self.options.estimator == "combin":
                off, adding = self.require_score(scores, f"{group.name}:off").bool(), self.options.adding
                overlaps = {o: estimators.oracle_overlap(off, correct, values, o, adding) for o in ORACLE}
                row |= {f"oracle_{o}": overlap for o, overlap in overlaps.items() if overlap is not None}
            rows.append(row)
        return rows

    def curves(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> Iterator[Curve]:
        """Draw how each group's ranking settled: rank correlation with the final one against the number of samples."""
        if self.options.estimator == "combin":
            return
        for group in graph.free:
            count = len(self.require_score(scores, f"{group.name}:correct"))
            final = self._estimate(scores, group.name)[0]
            samples = [n for n in (2**i for i in range(1, 32)) if n < count] + [count]
            ranks = [estimators.rank_correlation(self._estimate(scores, group.name, n)[0], final) for n in samples]
            label = "permutations" if self.options.estimator == "permutation" else "random sets"
            yield Curve(
                group.name, tuple(map(float, samples)), tuple(ranks), (label, "rank correlation with the final ranking")
            )

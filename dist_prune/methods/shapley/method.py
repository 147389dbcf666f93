"""Shapley values of channels: what each contributes to accuracy, over coalitions of the others.

Ancona, Oztireli, Gross: Shapley value as principled metric for structured network pruning, 2020 (permutations);
Adamczewski, Li, Van Gool: Shapley Pruning for Neural Network Compression, 2024 (regression, partial sums). Players are
the channels of one group, other groups are whole; a player's removal in the game is its removal in surgery. Accuracy
is in percent.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_prune.methods import base
from dist_prune.methods.shapley import estimators
from dist_prune.pruning.figure_data import Curve
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.gating import Where
from dist_prune.pruning.selection.ranking import SelectionRequest

Quirk = Literal["raw_outputs", "training_images", "augmented_images", "test_images"]
ORACLE = range(1, 6)  # sizes of the sets that the exhaustive check compares
DIGITS = 9  # of percent that values are compared by


class Options(base.QuirkOptions[Quirk], base.RankingOptions):
    """``samples``: random sets (kernel) or permutations; more of them later, in the same run directory, go on from
    those that are on record."""

    released = ("raw_outputs", "training_images", "augmented_images")  # test_images is the ImageNet programs' leak

    estimator: Literal["kernel", "permutation", "combin"] = Field(
        default="kernel", description="regression on random sets, permutation averages, all sets of some sizes"
    )
    samples: int = base.refinable(30, ge=1, le=10**9, description="random sets or permutations per group, at most")
    until: Literal["samples", "stable"] = base.refinable(
        "samples", description="take all samples, or stop a group as soon as its ranking is reliable"
    )
    reliability: float = base.refinable(
        0.95, gt=0, lt=1, description="until stable: share of the values' variance that is not sampling error"
    )
    k: int = Field(default=1, ge=1, le=10**6, description="combin: removal steps up to the k-th (1: leave one out)")
    adding: bool = Field(default=False, description="combin: the last k steps instead of the first")
    stack: int = Field(default=4, ge=1, le=65536, description="sets that go through the network together")
    memory_mb: int = base.select_only(
        1024, ge=1, le=10**9, description="for a process's kept activations; moves no score"
    )
    kernel: Literal["ols", "shap"] = base.select_only(
        "ols", description="plain least squares (the released program's), or Kernel SHAP with its weights and its sum"
    )


class Shapley(base.RankingMethod):
    """Removes what the network loses least accuracy without."""

    paper = "Adamczewski, Li, Van Gool, Shapley Pruning for Neural Network Compression, 2024"
    Options = Options
    equivariant = False  # coalitions are drawn by channel number

    @property
    def calibration_split(self) -> Literal["train", "held_out", "test"]:
        if self.has("test_images"):
            return test_images()
        return training_images() if self.has("training_images") else "held_out"

    @property
    def augmented(self) -> bool:
        return augmented_images() if self.has("augmented_images") else False

    @property
    def where(self) -> Where:
        """Where channels are switched off."""
        return raw_outputs() if self.has("raw_outputs") else "consumed"

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Per group: ``<group>:ends`` (3,) int64, images right with every and with no channel, and all; ``<group>:off``
        (n, C) uint8 with ``<group>:correct`` (n,) int64, or ``<group>:orders`` (P, C) int32 with ``<group>:correct``
        (P, C - 1), after each removal but the last."""
        options, widths = self.options, {group.name: group.width for group in context.graph.free}

        def run(job: tuple[str, str, int]) -> list[int]:
            kind, group, block = job
            off = self._block(context, kind, group, widths[group], block)
            return context.count_correct(group, off, where=self.where, memory_mb=options.memory_mb)

        def share(jobs: list[tuple[str, str, int]]) -> list[list[int]]:
            return context.map_jobs(jobs, run, keep="shapley")

        ends = share([("ends", name, 0) for name in widths])
        scores: base.Scores = {
            f"{name}:ends": torch.tensor([*found, context.images]) for name, found in zip(widths, ends, strict=True)
        }
        missing = list(widths)
        for samples in self._checks():
            spans = {name: self._evaluations(widths[name], samples) for name in missing}
            jobs = [
                (options.estimator, name, block)
                for name, count in spans.items() for block in range(-(-count // options.stack))
            ]  # fmt: skip
            found: dict[str, list[int]] = {name: [] for name in missing}
            for (_, name, _), counts in zip(jobs, share(jobs), strict=True):
                found[name] += counts
            for name in missing:
                correct = torch.tensor(found[name][: spans[name]])
                scores |= self._sampled(context, name, widths[name], samples, correct)
            missing = [name for name in missing if self._estimate(scores, name)[2] < options.reliability]
        return scores

    def check(self, graph: DependencyGraph, request: SelectionRequest) -> None:
        super().check(graph, request)
        if self.options.estimator == "combin":
            for group in graph.free:
                self._evaluations(group.width, 0)

    def cautions(self, graph: DependencyGraph) -> list[str]:
        if self.options.estimator != "kernel":
            return []
        samples, widths = self.options.samples, sorted({group.width for group in graph.free})
        close = [width for width in widths if estimators.near_threshold(samples, width)]
        if not close:
            return []
        names = [group.name for group in graph.free if group.width in close]
        better = estimators.samples_clear_of_threshold(widths, 2 * estimators.unknown_count(close[-1]))
        shown = ", ".join(names[:3]) + (f", ... {len(names)} groups" if len(names) > 3 else "")
        return [
            f"method.samples: {samples} random sets are about as many as the regression has unknowns for "
            f"{' or '.join(map(str, close))} channels (a value each and the intercept; {shown}). That is the worst "
            "number there is: the values follow the noise, and far fewer sets rank better. Take "
            f"method.samples={better}, or method.estimator=permutation."
        ]

    def _checks(self) -> list[int]:
        """Numbers of samples after which the rankings are looked at; the last one is all of them."""
        most = self.options.samples
        if self.options.until == "samples" or self.options.estimator == "combin":
            return [most]
        return [n for n in (8 * 2**i for i in range(32)) if n < most] + [most]

    def _evaluations(self, width: int, samples: int) -> int:
        if self.options.estimator == "combin":
            return estimators.subset_count(width, estimators.sizes_of(width, self.options.k, self.options.adding))
        return samples * (width - 1) if self.options.estimator == "permutation" else samples

    def _draw(self, context: base.ScoringContext, group: str) -> estimators.Draw:
        return lambda number: context.generator("shapley", self.options.estimator, group, number)

    def _block(self, context: base.ScoringContext, kind: str, group: str, width: int, block: int) -> Tensor:
        """(m, C) bool: the sets of a job. Whole blocks always, so that more samples later find the same numbers."""
        start, stop = block * self.options.stack, (block + 1) * self.options.stack
        if kind == "ends":
            return torch.tensor([[False] * width, [True] * width])
        if kind == "combin":
            return estimators.subsets(width, estimators.sizes_of(width, self.options.k, self.options.adding))[
                start:stop
            ]
        rows: Callable[..., Tensor] = estimators.random_sets if kind == "kernel" else estimators.permutation_prefixes
        return rows(width, start, stop, self._draw(context, group))

    def _sampled(
        self, context: base.ScoringContext, name: str, width: int, samples: int, correct: Tensor
    ) -> base.Scores:
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
        """(C,) values, their standard errors where there are some, reliability; of the first samples, or of all."""
        right = self.require_score(scores, f"{name}:correct")[:first]
        full, empty, images = self.require_score(scores, f"{name}:ends").tolist()
        accuracy, full, empty = 100 * right.double() / images, 100 * full / images, 100 * empty / images
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
        # channels that no set tells apart are equal: what a solver's last bits say of them is the processor's word
        return {g.name: self._estimate(scores, g.name)[0].round(decimals=DIGITS) for g in graph.free}

    def table(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> list[dict[str, Any]]:
        """Per group: samples, accuracy with every and with no channel, reliability of the ranking, and, where every
        set of a size was evaluated, how many of the best to remove the values point out."""
        rows = []
        for group in graph.free:
            values, _, reliable = self._estimate(scores, group.name)
            correct = self.require_score(scores, f"{group.name}:correct")
            full, empty, images = self.require_score(scores, f"{group.name}:ends").tolist()
            row: dict[str, Any] = {
                "group": group.name, "samples": len(correct), "full": 100 * full / images,
                "empty": 100 * empty / images, "reliability": reliable,
            }  # fmt: skip
            if self.options.estimator == "combin":
                off, adding = self.require_score(scores, f"{group.name}:off").bool(), self.options.adding
                overlaps = {o: estimators.oracle_overlap(off, correct, values, o, adding) for o in ORACLE}
                row |= {f"oracle_{o}": overlap for o, overlap in overlaps.items() if overlap is not None}
            rows.append(row)
        return rows

    def curves(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> Iterator[Curve]:
        """How the ranking of each group came to be: its rank correlation with the final one."""
        if self.options.estimator == "combin":
            return
        for group in graph.free:
            count, final = (
                len(self.require_score(scores, f"{group.name}:correct")),
                self._estimate(scores, group.name)[0],
            )
            at = [n for n in (2**i for i in range(1, 32)) if n < count] + [count]
            ranks = [estimators.rank_correlation(self._estimate(scores, group.name, n)[0], final) for n in at]
            what = "permutations" if self.options.estimator == "permutation" else "random sets"
            yield Curve(
                group.name, tuple(map(float, at)), tuple(ranks), (what, "rank correlation with the final ranking")
            )


# What the released code does otherwise (specification, sections 2 and 9); each is a quirk of its name.


def raw_outputs() -> Where:
    """Filters and biases are zeroed, batch norms are not: a removed channel still gives the constant beta - gamma mu /
    sigma."""
    return "output"


def training_images() -> Literal["train"]:
    """Accuracy is measured on images that the network was, or will be, trained on."""
    return "train"


def test_images() -> Literal["test"]:
    """Accuracy is measured on the images that the result is judged by (the ImageNet programs)."""
    return "test"


def augmented_images() -> bool:
    """Accuracy is measured on training augmentations (the CIFAR programs); here they follow the recipe's seed."""
    return True

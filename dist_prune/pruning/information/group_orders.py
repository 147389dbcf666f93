"""Orders of many groups: what is dealt over ranks, and what a stopped run finds again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dist_prune.pruning.information.backward_elimination import (
    Elimination,
    EliminationState,
    EstimatorBank,
    one_shot_order,
)
from dist_prune.pruning.information.group_samples import GroupSamples

PARTS = 8  # into how many the channels are dealt: more than there are useful ranks per batch
STATIC = {"relevance": "relevance", "entropy": "alone"}  # criteria that need one pass


@dataclass(frozen=True)
class GroupOrder:
    """A group's order and (K,) float64 entropies of its channels in bits, mean over taps and batches."""

    state: EliminationState
    alone: Tensor


@dataclass
class EliminationScheduler:
    """Ranks subjects; the same on every rank.

    Attributes:
        share: bench.share: independent jobs over ranks, saved.
        keep: bench.keep: the state of an elimination.
        rule: the rule of deletion of a subject.
        parallel: ``layers`` deals whole groups over ranks; ``batches`` and ``candidates`` deal the work of every step.
    """

    share: Callable[..., list[Any]]
    keep: Callable[..., dict[str, Tensor]]
    rule: Callable[[GroupSamples], Elimination]
    parallel: Literal["layers", "batches", "candidates"] = "layers"

    def orders(self, group_samples: Sequence[GroupSamples], dead: Sequence[Sequence[int]]) -> list[GroupOrder]:
        """One order per subject; the channels of ``dead`` go first."""
        sigmas = group_bandwidths(group_samples, self.share)
        starts = [
            EliminationState(s.width, [*gone], [0.0] * len(gone), [0.0] * len(gone))
            for s, gone in zip(group_samples, dead, strict=True)
        ]
        if self.parallel == "layers":
            return self._by_layers(group_samples, sigmas, starts)
        return [self._inside(*each) for each in zip(group_samples, sigmas, starts, strict=True)]

    def _by_layers(
        self, group_samples: Sequence[GroupSamples], sigmas: Sequence[list[Tensor]], courses: list[EliminationState]
    ) -> list[GroupOrder]:
        panels: dict[int, EstimatorBank] = {}
        costs, numbers = [samples.cost for samples in group_samples], range(len(group_samples))

        def panel(number: int) -> EstimatorBank:
            return panels.setdefault(number, group_samples[number].estimator_bank(sigmas[number]))

        def entropies(job: tuple[str, str, int]) -> Tensor:
            return panel(job[2]).total("alone", range(group_samples[job[2]].width))

        alone = self.share([("alone", group_samples[i].name, i) for i in numbers], entropies, costs=costs)
        leg = 0
        while not all(state.done for state in courses):

            def further(job: tuple[str, str, int, int], before: list[EliminationState] = courses) -> Tensor:
                number, state = job[2], before[job[2]]
                if not state.done:
                    state = self._further(group_samples[number], panel(number), alone[number].sum(0), state)
                if state.done:
                    panels.pop(number, None)  # its kernels are no longer needed
                return state.tensor()

            tables = self.share([("leg", group_samples[i].name, i, leg) for i in numbers], further, costs=costs)
            courses = [EliminationState.from_table(group_samples[i].width, tables[i]) for i in numbers]
            leg += 1
        return [GroupOrder(courses[i], _mean(group_samples[i], alone[i])) for i in numbers]

    def _inside(self, samples: GroupSamples, sigmas: list[Tensor], state: EliminationState) -> GroupOrder:
        """One subject, the work of every step dealt over ranks."""
        bank = samples.estimator_bank(sigmas, self.share, 1 if self.parallel == "batches" else PARTS)
        alone = bank.total("alone", range(samples.width))
        saved = self.keep(samples.name)
        if saved:
            state = EliminationState.from_table(samples.width, saved["course"])
        while not state.done:
            state = self._further(samples, bank, alone.sum(0), state)
            self.keep(samples.name, {"course": state.tensor()})
        return GroupOrder(state, _mean(samples, alone))

    def _further(
        self, samples: GroupSamples, bank: EstimatorBank, alone: Tensor, state: EliminationState
    ) -> EliminationState:
        criterion, rule = samples.estimator.criterion, self.rule(samples)
        if criterion not in STATIC:
            return rule.advance(bank, alone, state)
        whole = one_shot_order(bank, STATIC[criterion], alone, rule.combine, rule.rev)
        first = set(state.order)
        rest = [i for i, k in enumerate(whole.order) if k not in first]
        order = state.order + [whole.order[i] for i in rest]
        return EliminationState(samples.width, order, state.scores + [whole.scores[i] for i in rest], whole.joints)


def group_bandwidths(group_samples: Sequence[GroupSamples], share: Callable[..., list[Any]]) -> list[list[Tensor]]:
    """[subject][tap] -> (K,) kernel widths; batches are dealt over ranks."""
    jobs = []
    for number, samples in enumerate(group_samples):
        alike = samples.estimator.binning or samples.estimator.width == "entropy_target"
        batches = range(1 if alike else len(samples.batches))
        jobs += [("widths", samples.name, number, tap, batch) for tap in range(len(samples.taps)) for batch in batches]

    def run(job: tuple[str, str, int, int, int]) -> Tensor:
        samples = group_samples[job[2]]
        if samples.estimator.binning:
            return torch.ones(samples.width, dtype=torch.float64)
        return samples.batch_bandwidths(job[3], job[4])

    found = share(jobs, run)
    out: list[list[list[Tensor]]] = [[[] for _ in samples.taps] for samples in group_samples]
    for (_, _, number, tap, _), sigma in zip(jobs, found, strict=True):
        out[number][tap].append(sigma)
    return [[s.combine_bandwidths(rows) for rows in taps] for s, taps in zip(group_samples, out, strict=True)]


def _mean(samples: GroupSamples, alone: Tensor) -> Tensor:
    bank = samples.estimator_bank([torch.ones(samples.width)] * len(samples.taps))
    batches = bank.batches if bank.counted is None else len(bank.counted)
    return alone.double().mean(0) / batches / bank.unit

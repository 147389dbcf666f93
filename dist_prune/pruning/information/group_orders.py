"""Elimination orders of many groups: distribution over ranks, and resuming after a stop."""

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

CHANNEL_SHARDS = 8  # parts of the channels, more than the ranks that are useful for a batch
STATIC = {"relevance": "relevance", "entropy": "alone"}  # criterion that needs one pass -> method of the estimators


@dataclass(frozen=True)
class GroupOrder:
    """Order of a group.

    Attributes:
        state: the finished elimination.
        alone: (K,) float64 entropy of each channel in bits, mean over taps and batches.
    """

    state: EliminationState
    alone: Tensor


@dataclass
class EliminationScheduler:
    """Runs the eliminations of many groups. All ranks must call it alike, and get the same orders.

    Attributes:
        map_jobs: ``ScoringContext.map_jobs``: independent jobs over ranks, results saved.
        checkpoint: ``ScoringContext.checkpoint``: saves and returns the state of an elimination.
        rule: gives the rule of removal of a group.
        parallel: ``layers`` spreads whole groups over ranks; ``batches`` and ``candidates`` spread the work of each
            step.
    """

    map_jobs: Callable[..., list[Any]]
    checkpoint: Callable[..., dict[str, Tensor]]
    rule: Callable[[GroupSamples], Elimination]
    parallel: Literal["layers", "batches", "candidates"] = "layers"

    def orders(self, group_samples: Sequence[GroupSamples], dead: Sequence[Sequence[int]]) -> list[GroupOrder]:
        """Order the channels of each group.

        Args:
            group_samples: activations of the groups, complete on every rank.
            dead: for each group the channels that go first, in this order.

        Returns:
            One order for each group.
        """
        sigmas = group_bandwidths(group_samples, self.map_jobs)
        starts = [
            EliminationState(s.width, [*channels], [0.0] * len(channels), [0.0] * len(channels))
            for s, channels in zip(group_samples, dead, strict=True)
        ]
        if self.parallel == "layers":
            return self._order_groups_in_parallel(group_samples, sigmas, starts)
        return [self._order_one_group(*arguments) for arguments in zip(group_samples, sigmas, starts, strict=True)]

    def _order_groups_in_parallel(
        self, group_samples: Sequence[GroupSamples], sigmas: Sequence[list[Tensor]], states: list[EliminationState]
    ) -> list[GroupOrder]:
        """Order all groups at once, whole groups spread over ranks, and save after each segment of steps."""
        banks: dict[int, EstimatorBank] = {}
        costs, numbers = [samples.cost for samples in group_samples], range(len(group_samples))

        def bank_of(number: int) -> EstimatorBank:
            return banks.setdefault(number, group_samples[number].estimator_bank(sigmas[number]))

        def entropies(job: tuple[str, str, int]) -> Tensor:
            return bank_of(job[2]).sum_over_batches("alone", range(group_samples[job[2]].width))

        alone = self.map_jobs([("alone", group_samples[i].name, i) for i in numbers], entropies, costs=costs)
        segment = 0
        while not all(state.done for state in states):

            def advance(job: tuple[str, str, int, int], previous: list[EliminationState] = states) -> Tensor:
                number, state = job[2], previous[job[2]]
                if not state.done:
                    state = self._advance(group_samples[number], bank_of(number), alone[number].sum(0), state)
                if state.done:
                    banks.pop(number, None)  # its kernels are no longer needed
                return state.to_table()

            tables = self.map_jobs([("leg", group_samples[i].name, i, segment) for i in numbers], advance, costs=costs)
            states = [EliminationState.from_table(group_samples[i].width, tables[i]) for i in numbers]
            segment += 1
        return [GroupOrder(states[i], _mean_entropies(group_samples[i], alone[i])) for i in numbers]

    def _order_one_group(self, samples: GroupSamples, sigmas: list[Tensor], state: EliminationState) -> GroupOrder:
        """Order one group, with the work of every step spread over ranks."""
        bank = samples.estimator_bank(sigmas, self.map_jobs, 1 if self.parallel == "batches" else CHANNEL_SHARDS)
        alone = bank.sum_over_batches("alone", range(samples.width))
        saved = self.checkpoint(samples.name)
        if saved:
            state = EliminationState.from_table(samples.width, saved["course"])
        while not state.done:
            state = self._advance(samples, bank, alone.sum(0), state)
            self.checkpoint(samples.name, {"course": state.to_table()})
        return GroupOrder(state, _mean_entropies(samples, alone))

    def _advance(
        self, samples: GroupSamples, bank: EstimatorBank, alone: Tensor, state: EliminationState
    ) -> EliminationState:
        criterion, rule = samples.estimator.criterion, self.rule(samples)
        if criterion not in STATIC:
            return rule.advance(bank, alone, state)
        static = one_shot_order(bank, STATIC[criterion], alone, rule.combine, rule.rev)
        removed = set(state.order)
        positions = [i for i, k in enumerate(static.order) if k not in removed]
        order = state.order + [static.order[i] for i in positions]
        return EliminationState(
            samples.width, order, state.scores + [static.scores[i] for i in positions], static.joints
        )


def group_bandwidths(group_samples: Sequence[GroupSamples], map_jobs: Callable[..., list[Any]]) -> list[list[Tensor]]:
    """Find the bandwidths of all groups; batches are spread over ranks and combined in their order.

    Args:
        group_samples: activations of the groups, complete on every rank.
        map_jobs: ``ScoringContext.map_jobs``.

    Returns:
        [group][tap] -> (K,) float64.
    """
    jobs = []
    for number, samples in enumerate(group_samples):
        same_for_all_batches = samples.estimator.binning or samples.estimator.width == "entropy_target"
        batches = range(1 if same_for_all_batches else len(samples.batches))
        jobs += [("widths", samples.name, number, tap, batch) for tap in range(len(samples.taps)) for batch in batches]

    def run(job: tuple[str, str, int, int, int]) -> Tensor:
        samples = group_samples[job[2]]
        if samples.estimator.binning:
            return torch.ones(samples.width, dtype=torch.float64)
        return samples.batch_bandwidths(job[3], job[4])

    results = map_jobs(jobs, run)
    per_batch: list[list[list[Tensor]]] = [[[] for _ in samples.taps] for samples in group_samples]
    for (_, _, number, tap, _), sigma in zip(jobs, results, strict=True):
        per_batch[number][tap].append(sigma)
    return [[s.combine_bandwidths(rows) for rows in taps] for s, taps in zip(group_samples, per_batch, strict=True)]


def _mean_entropies(samples: GroupSamples, alone: Tensor) -> Tensor:
    bank = samples.estimator_bank([torch.ones(samples.width)] * len(samples.taps))
    batches = bank.batches if bank.counted_batches is None else len(bank.counted_batches)
    return alone.double().mean(0) / batches / bank.unit

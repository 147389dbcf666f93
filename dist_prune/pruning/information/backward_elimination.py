"""Backward elimination: filters of a group are removed one after another, the one with the largest score first.

Scores of batches are rounded to multiples of a unit and added as integers, so an order does not depend on the rank that
computed a score, or on the scores computed with it. Ties go to the channel with the smaller entropy, then to the
smaller index (entropy specification, sections 1 and 8.4).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dist_prune.pruning.information.bandwidth import smooth_over_batches
from dist_prune.pruning.information.estimators import ALL_REMAINING, EntropyEstimator

EstimatorFactory = Callable[[int, int, list[int]], EntropyEstimator]  # (tap, batch, own channels) -> estimator
MapJobs = Callable[[Sequence[Any], Callable[[Any], Any]], list[Any]]
UNITS_PER_BIT = {torch.float64: 1e9, torch.float32: 1e6}  # entropies in double precision are accurate to 1e-12
STEPS_PER_SEGMENT = 64  # then sums are computed anew, and an elimination can be resumed


@dataclass
class EstimatorBank:
    """All estimators of one group, one for each hook point (tap), batch and shard of the channels.

    Attributes:
        width: number of channels of the group.
        taps: number of hook points.
        batches: number of batches.
        make_estimator: makes the estimator of (tap, batch, own channels).
        map_jobs: ``ScoringContext.map_jobs``, to spread the estimators over ranks and gather their answers; None
            computes everything in this process.
        shards: number of parts into which the channels are split if there is a ``map_jobs``.
        counted_batches: the batches whose scores count; None: all.
        unit: units per bit to which scores are rounded.
        bandwidths: what is searched before a step: nothing (``fixed``), the bandwidth of every remainder
            (``remainders``), or that of every filter (``filters``).
        remaining: the remaining set.
    """

    width: int
    taps: int
    batches: int
    make_estimator: EstimatorFactory
    map_jobs: MapJobs | None = None
    shards: int = 1
    counted_batches: Sequence[int] | None = None
    unit: float = 1e9
    bandwidths: Literal["fixed", "remainders", "filters"] = "fixed"
    remaining: list[int] = field(default_factory=list)
    _estimators: dict[tuple[int, int, int], EntropyEstimator] = field(default_factory=dict)

    def estimator(self, tap: int, batch: int, shard: int = 0) -> EntropyEstimator:
        """The estimator of a hook point, batch and shard, made at first use."""
        key = (tap, batch, shard)
        if key not in self._estimators:
            own_channels = list(range(shard, self.width, self.shards if self.map_jobs else 1))
            self._estimators[key] = self.make_estimator(tap, batch, own_channels)
            if self.remaining:
                self._estimators[key].begin(self.remaining)
        return self._estimators[key]

    def evaluate(
        self, method: str, channels: Sequence[int], batches: Iterable[int] | None = None, argument: Any = None
    ) -> Any:
        """Call a method of all estimators, in the processes that own them.

        Args:
            method: name of a method of ``EntropyEstimator`` that takes channels.
            channels: channels of the group; ``ALL_REMAINING`` goes to the first shard.
            batches: numbers of the batches; None: all.
            argument: second argument of the method: (len(channels),) for each tap.

        Returns:
            table[tap][batch]: (len(channels),) float64 in bits, or None if the estimator has no answer. The same on
            every rank.
        """
        numbers = list(range(self.batches) if batches is None else batches)
        table = [[None] * len(numbers) for _ in range(self.taps)]
        shards = 1 if self.map_jobs is None else self.shards
        jobs = [(tap, batch, shard) for tap in range(self.taps) for batch in numbers for shard in range(shards)]

        def run(job: tuple[int, int, int]) -> list[float] | None:
            tap, _, shard = job
            positions = shard_positions(channels, shards, shard)
            shard_channels = [channels[i] for i in positions]
            if not shard_channels:
                return []
            arguments = () if argument is None else (argument[tap][positions],)
            answer = getattr(self.estimator(*job), method)(shard_channels, *arguments)
            return None if answer is None else answer.tolist()

        answers = [run(job) for job in jobs] if self.map_jobs is None else self.map_jobs(jobs, run)
        for (tap, batch, shard), answer in zip(jobs, answers, strict=True):
            if answer is not None:
                row = numbers.index(batch)
                if table[tap][row] is None:
                    table[tap][row] = torch.zeros(len(channels), dtype=torch.float64)  # type: ignore[call-overload]
                table[tap][row][shard_positions(channels, shards, shard)] = torch.tensor(answer, dtype=torch.float64)  # type: ignore[index]
        return table

    def evaluate_in_units(self, method: str, channels: Sequence[int], round_up: bool = False) -> Tensor | None:
        """Call a method of all estimators and round the answers to units.

        Args:
            method: see ``evaluate``.
            channels: see ``evaluate``.
            round_up: for bounds.

        Returns:
            (taps, counted batches, len(channels)) int64 in units, or None if an estimator has no answer.
        """
        table = self.evaluate(
            method, channels, range(self.batches) if self.counted_batches is None else self.counted_batches
        )
        if any(row is None for rows in table for row in rows):
            return None
        answers = torch.stack([torch.stack(rows) for rows in table]) * self.unit
        return answers.ceil().long() + 1 if round_up else answers.round().long()

    def sum_over_batches(self, method: str, channels: Sequence[int]) -> Tensor:
        """Call a method of all estimators and add the rounded answers over the counted batches.

        Args:
            method: see ``evaluate``.
            channels: see ``evaluate``.

        Returns:
            (taps, len(channels)) int64 in units; divide by ``unit`` and the number of batches for the mean in bits.
        """
        values = self.evaluate_in_units(method, channels)
        assert values is not None
        return values.sum(1)

    def search_bandwidths(self, channels: Sequence[int]) -> None:
        """Let the estimators of each batch search bandwidths, and smooth them in the order of the batches.

        Args:
            channels: see ``EntropyEstimator.search_bandwidths``.
        """
        sigmas = [smooth_over_batches(rows) for rows in self.evaluate("search_bandwidths", channels)]
        for (tap, _, _), estimator in self._estimators.items():
            estimator.set_bandwidths(channels, sigmas[tap])

    def begin(self, remaining: Sequence[int]) -> None:
        """Start all estimators with a remaining set."""
        self.remaining = list(remaining)
        for estimator in self._estimators.values():
            estimator.begin(remaining)

    def remove(self, gone: Sequence[int]) -> None:
        """Remove channels from the remaining set of all estimators."""
        self.remaining = [k for k in self.remaining if k not in set(gone)]
        for estimator in self._estimators.values():
            estimator.remove(gone)

    @property
    def spectra_solved(self) -> int:
        """Number of eigenvalue problems solved in this process."""
        return sum(estimator.spectra_solved for estimator in self._estimators.values())


def shard_positions(channels: Sequence[int], shards: int, shard: int) -> list[int]:
    """Positions in ``channels`` of those that belong to a shard; ``ALL_REMAINING`` belongs to the first."""
    return [i for i, k in enumerate(channels) if max(k, 0) % shards == shard]


@dataclass
class EliminationState:
    """State of an elimination; it can be saved after any step.

    Attributes:
        width: number of channels of the group.
        order: removed channels, first removed first.
        scores: criterion at each removal, in bits, mean over batches (with ``rank``: sum of ordinals).
        joints: joint entropy of the remaining set before each removal, in bits, mean over batches; the largest of the
            taps.
    """

    width: int
    order: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    joints: list[float] = field(default_factory=list)

    @property
    def remaining(self) -> list[int]:
        """Channels that are not removed, ascending."""
        removed = set(self.order)
        return [k for k in range(self.width) if k not in removed]

    @property
    def done(self) -> bool:
        """Whether all channels are in the order."""
        return len(self.order) >= self.width

    def to_table(self) -> Tensor:
        """(removals, 3) float64: order, scores and joints, to be saved or sent."""
        columns = [[float(k) for k in self.order], self.scores, self.joints]
        return torch.tensor(columns, dtype=torch.float64).T.contiguous().reshape(-1, 3)

    @classmethod
    def from_table(cls, width: int, table: Tensor) -> "EliminationState":
        """The state of a table.

        Args:
            width: number of channels of the group.
            table: (removals, 3) float64 of ``to_table``.
        """
        order, scores, joints = table.T.tolist() if len(table) else ([], [], [])
        return cls(width, [int(k) for k in order], scores, joints)


@dataclass
class Elimination:
    """Rule by which channels are removed.

    Attributes:
        combine: how the taps of a residual stream are combined (specification, section 5.1): ``rank`` adds the ordinals
            that a channel has among the scores of each tap, ``sum`` adds the scores.
        rev: remove the smallest score first (ablation).
        step: fraction of the remaining set that is removed in one step; 0: one channel.
        exhaustive: evaluate every candidate even if bounds make that unnecessary. The order is the same.
        at_once: number of candidates evaluated between two comparisons with the bounds, if a ``map_jobs`` spreads them.
    """

    combine: Literal["rank", "sum"] = "rank"
    rev: bool = False
    step: float = 0.0
    exhaustive: bool = False
    at_once: int = 8

    def advance(
        self, bank: EstimatorBank, alone: Tensor, state: EliminationState, steps: int = STEPS_PER_SEGMENT
    ) -> EliminationState:
        """Do up to ``steps`` more steps. The last remaining channel ends the order.

        Args:
            bank: estimators of the group; restarted with the remaining set of ``state``.
            alone: (width,) int64, entropy of each channel in units, summed over taps and batches, for ties.
            state: progress of the elimination; modified.
            steps: number of steps.

        Returns:
            ``state``. All ranks get the same.
        """
        bank.begin(state.remaining)
        batch_count = bank.batches if bank.counted_batches is None else len(bank.counted_batches)
        for _ in range(steps):
            remaining = bank.remaining
            if not remaining:
                break
            if bank.bandwidths != "fixed":
                bank.search_bandwidths(remaining if bank.bandwidths == "filters" else [ALL_REMAINING, *remaining])
            joint = bank.sum_over_batches("joint", [ALL_REMAINING])
            state.joints.append(float(joint.max()) / batch_count / bank.unit)
            if len(remaining) == 1:
                state.order += remaining
                state.scores.append(0.0)
                bank.remove(remaining)
                break
            count = min(max(1, math.ceil(self.step * len(remaining))), len(remaining) - 1)
            chosen, scores = self._select(bank, remaining, alone, count)
            state.joints += [state.joints[-1]] * (len(chosen) - 1)
            state.order += chosen
            state.scores += scores if self._adds_ordinals(bank) else [s / batch_count / bank.unit for s in scores]
            bank.remove(chosen)
        return state

    def _adds_ordinals(self, bank: EstimatorBank) -> bool:
        return bank.taps > 1 and self.combine == "rank"

    def _select(
        self, bank: EstimatorBank, remaining: list[int], alone: Tensor, count: int
    ) -> tuple[list[int], list[float]]:
        """The channels to remove, the largest score first, and their scores in units (or sums of ordinals)."""
        sign = -1 if self.rev else 1
        plain = self.exhaustive or self.rev or self._adds_ordinals(bank)
        bounds = None if plain else bank.evaluate_in_units("bound", remaining, round_up=True)
        if bounds is not None:
            candidates = self._best_first(bank, remaining, bounds, count)
        else:
            scores = bank.sum_over_batches("score", remaining)
            if self._adds_ordinals(bank):
                scores, sign = ordinals(sign * scores, alone[remaining]), 1
            candidates = dict(zip(remaining, (sign * scores.sum(0)).tolist(), strict=True))
        ties = alone.tolist()
        order = sorted(candidates, key=lambda k: (-candidates[k], ties[k], k))[:count]
        return order, [float(sign * candidates[k]) for k in order]

    def _best_first(self, bank: EstimatorBank, remaining: list[int], bounds: Tensor, count: int) -> dict[int, int]:
        """Exact scores of all candidates that may be among the ``count`` largest (specification, section 8.2).

        Candidates are evaluated in descending order of their bounds until the next bound is below the best exact
        scores.
        """
        upper = bounds.sum((0, 1)).tolist()
        promising = sorted(range(len(remaining)), key=lambda i: (-upper[i], remaining[i]))
        scores: dict[int, int] = {}
        at_once = self.at_once if bank.map_jobs is not None else 1
        for start in range(0, len(promising), at_once):
            group = promising[start : start + at_once]
            threshold = sorted(scores.values(), reverse=True)[count - 1] if len(scores) >= count else -math.inf
            if upper[group[0]] < threshold:
                break
            chosen = [remaining[i] for i in group]
            if bank.map_jobs is None:
                exact = self._score_unless_below(bank, chosen[0], bounds[:, :, group[0]], threshold)
                scores |= {} if exact is None else {chosen[0]: exact}
            else:
                scores.update(zip(chosen, bank.sum_over_batches("score", chosen).sum(0).tolist(), strict=True))
        return scores

    @staticmethod
    def _score_unless_below(bank: EstimatorBank, channel: int, bounds: Tensor, threshold: float) -> int | None:
        """The exact score, batch after batch; None as soon as it cannot reach the threshold."""
        total = int(bounds.sum())
        for tap in range(bank.taps):
            for row, batch in enumerate(range(bank.batches) if bank.counted_batches is None else bank.counted_batches):
                exact = float(bank.estimator(tap, batch).score([channel])[0])
                total += round(exact * bank.unit) - int(bounds[tap, row])
                if total < threshold:
                    return None
        return total


def ordinals(scores: Tensor, alone: Tensor) -> Tensor:
    """Rank of each score in the ascending order of its tap, from 1.

    Args:
        scores: (taps, k) int64.
        alone: (k,) int64, entropies for ties.

    Returns:
        (taps, k) int64.
    """
    out = torch.zeros_like(scores)
    for tap, row in enumerate(scores.tolist()):
        order = sorted(range(len(row)), key=lambda i: (row[i], -int(alone[i]), -i))
        out[tap, order] = torch.arange(1, len(row) + 1)
    return out


def static_order(importance: Tensor, alone: Tensor, rev: bool = False) -> list[int]:
    """Order channels by importance without elimination, the least important first.

    Args:
        importance: (K,) int64 in units.
        alone: (K,) int64, entropies for ties.
        rev: the most important first.
    """
    sign = -1 if rev else 1
    return sorted(range(len(importance)), key=lambda k: (sign * int(importance[k]), int(alone[k]), k))


def one_shot_order(
    bank: EstimatorBank, method: str, alone: Tensor, combine: str = "rank", rev: bool = False
) -> EliminationState:
    """Order channels by a criterion that does not depend on the remaining set, the smallest first.

    Args:
        bank: estimators of the group.
        method: ``alone`` for H(Z_k) or ``relevance`` for I(Z_k; Y).
        alone: (width,) int64, entropies for ties.
        combine: see ``Elimination``.
        rev: the largest first.

    Returns:
        A finished state. Its scores are negated, so the largest is first, and its joints are 0.
    """
    bank.begin(range(bank.width))
    importance = bank.sum_over_batches(method, range(bank.width))
    batch_count = bank.batches if bank.counted_batches is None else len(bank.counted_batches)
    scores = importance.sum(0).double() / batch_count / bank.unit
    if bank.taps > 1 and combine == "rank":
        importance = -ordinals(-importance, alone)
    order = static_order(importance.sum(0), alone, rev)
    return EliminationState(bank.width, order, [-float(scores[k]) for k in order], [0.0] * bank.width)

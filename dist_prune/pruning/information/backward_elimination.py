"""Backward elimination: filters of a layer are deleted one after another, the one with the largest score first.

Scores of batches are rounded to multiples of a unit and added as integers, so an order does not depend on where and in
which company a score was computed. Ties fall to the channel with the smaller entropy, then to the smaller index.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dist_prune.pruning.information.bandwidth import smooth_over_batches
from dist_prune.pruning.information.estimators import ALL_REMAINING, EntropyEstimator

EstimatorFactory = Callable[
    [int, int, list[int]], EntropyEstimator
]  # tap, batch, the channels that it answers for -> a judge
MapJobs = Callable[[Sequence[Any], Callable[[Any], Any]], list[Any]]
UNITS_PER_BIT = {torch.float64: 1e9, torch.float32: 1e6}  # of a bit; entropies in double precision are good to 1e-12
STEPS_PER_SEGMENT = 64  # steps between two points where sums are made anew, and where an elimination can be resumed


@dataclass
class EstimatorBank:
    """All judges of one group, over its taps and batches; here, or dealt over ranks in ``parts`` of the channels.

    Attributes:
        width: channels of the group.
        taps, batches: how many.
        make: a judge of a tap and a batch for some channels.
        share: bench.share, to deal the judges over ranks; None: all work is done here.
        parts: into how many the channels are split when judges are dealt.
        counted: the batches whose scores count; None: all.
        unit: rounding of scores, per bit.
        widths: what judges look widths for before they score: nothing, every rest, or every filter anew in each step.
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
        """The judge, made where it is first asked for."""
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
        """[tap][batch] -> tensor of ``verb``'s answers for ``channels``, or None where a judge has none."""
        numbers = list(range(self.batches) if batches is None else batches)
        table = [[None] * len(numbers) for _ in range(self.taps)]
        shards = 1 if self.map_jobs is None else self.shards
        jobs = [(tap, batch, shard) for tap in range(self.taps) for batch in numbers for shard in range(shards)]

        def run(job: tuple[int, int, int]) -> list[float] | None:
            tap, _, shard = job
            positions = [i for i, k in enumerate(channels) if max(k, 0) % shards == shard]
            shard_channels = [channels[i] for i in positions]
            arguments = () if argument is None else (argument[tap][positions],)
            answer = (
                getattr(self.estimator(*job), method)(shard_channels, *arguments) if shard_channels else torch.zeros(0)
            )
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
        """(taps, counted batches, len) int64: answers in units; rounded ``up`` for bounds."""
        table = self.evaluate(
            method, channels, range(self.batches) if self.counted_batches is None else self.counted_batches
        )
        if any(row is None for rows in table for row in rows):
            return None
        answers = torch.stack([torch.stack(rows) for rows in table]) * self.unit
        return answers.ceil().long() + 1 if round_up else answers.round().long()

    def sum_over_batches(self, method: str, channels: Sequence[int]) -> Tensor:
        """(taps, len) int64: answers in units, added over the counted batches."""
        values = self.evaluate_in_units(method, channels)
        assert values is not None
        return values.sum(1)

    def search_bandwidths(self, channels: Sequence[int]) -> None:
        """Widths that the judges look for themselves: searched per batch, smoothed in the order of the batches."""
        sigmas = [smooth_over_batches(rows) for rows in self.evaluate("search_bandwidths", channels)]
        for (tap, _, _), estimator in self._estimators.items():
            estimator.set_bandwidths(channels, sigmas[tap])

    def begin(self, remaining: Sequence[int]) -> None:
        self.remaining = list(remaining)
        for estimator in self._estimators.values():
            estimator.begin(remaining)

    def remove(self, gone: Sequence[int]) -> None:
        self.remaining = [k for k in self.remaining if k not in set(gone)]
        for estimator in self._estimators.values():
            estimator.remove(gone)

    @property
    def spectra_solved(self) -> int:
        """Eigenvalue problems solved in this process."""
        return sum(estimator.spectra_solved for estimator in self._estimators.values())


def shard_positions(channels: Sequence[int], shards: int, shard: int) -> Tensor:
    """Positions of the channels that a part answers for; WHOLE belongs to the first."""
    return torch.tensor([i for i, k in enumerate(channels) if max(k, 0) % shards == shard], dtype=torch.long)


@dataclass
class EliminationState:
    """How far an elimination is.

    Attributes:
        width: channels of the group.
        order: deleted channels, first deleted first.
        scores: criterion at each deletion, in bits, mean over batches (ranks: sum of ordinals).
        joints: per step, the entropy in bits of what was there before it, mean over batches; the largest of the taps.
    """

    width: int
    order: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    joints: list[float] = field(default_factory=list)

    @property
    def remaining(self) -> list[int]:
        removed = set(self.order)
        return [k for k in range(self.width) if k not in removed]

    @property
    def done(self) -> bool:
        return len(self.order) >= self.width

    def to_table(self) -> Tensor:
        """(deletions, 3) float64, to be saved or sent."""
        columns = [[float(k) for k in self.order], self.scores, self.joints]
        return torch.tensor(columns, dtype=torch.float64).T.contiguous().reshape(-1, 3)

    @classmethod
    def from_table(cls, width: int, table: Tensor) -> "EliminationState":
        order, scores, joints = table.T.tolist() if len(table) else ([], [], [])
        return cls(width, [int(k) for k in order], scores, joints)


@dataclass
class Elimination:
    """The rule of deletion.

    Attributes:
        combine: how taps of a residual stream agree: ``rank`` adds the ordinals that a channel has among each tap's
            scores, ``sum`` adds the scores.
        rev: delete the smallest score first.
        step: share of what remains that goes at once (0: one channel).
        exhaustive: evaluate every candidate even where bounds would spare that.
        at_once: candidates that are evaluated together between two looks at the bounds, where judges are dealt.
    """

    combine: Literal["rank", "sum"] = "rank"
    rev: bool = False
    step: float = 0.0
    exhaustive: bool = False
    at_once: int = 8

    def advance(
        self, bank: EstimatorBank, alone: Tensor, state: EliminationState, steps: int = STEPS_PER_SEGMENT
    ) -> EliminationState:
        """Up to ``steps`` more deletions; the last channel left ends the order.

        Args:
            alone: (width,) int64, entropy of each channel in units, for ties.
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
        """The channels to delete, the worst first, and their scores in units (or sums of ordinals)."""
        sign = -1 if self.rev else 1
        plain = self.exhaustive or self.rev or self._adds_ordinals(bank)
        bounds = None if plain else bank.evaluate_in_units("bound", remaining, round_up=True)
        if bounds is not None:
            found = self._best_first(bank, remaining, bounds, count)
        else:
            scores = bank.sum_over_batches("score", remaining)
            if self._adds_ordinals(bank):
                scores, sign = ordinals(sign * scores, alone[remaining]), 1
            found = dict(zip(remaining, (sign * scores.sum(0)).tolist(), strict=True))
        ties = alone.tolist()
        order = sorted(found, key=lambda k: (-found[k], ties[k], k))[:count]
        return order, [float(sign * found[k]) for k in order]

    def _best_first(self, bank: EstimatorBank, remaining: list[int], bounds: Tensor, count: int) -> dict[int, int]:
        """Exact scores of all candidates that may be among the ``count`` largest, most promising first."""
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
        """The exact score, batch after batch; None as soon as it cannot reach the bar any more."""
        total = int(bounds.sum())
        for tap in range(bank.taps):
            for row, batch in enumerate(range(bank.batches) if bank.counted_batches is None else bank.counted_batches):
                exact = float(bank.estimator(tap, batch).score([channel])[0])
                total += round(exact * bank.unit) - int(bounds[tap, row])
                if total < threshold:
                    return None
        return total


def ordinals(scores: Tensor, alone: Tensor) -> Tensor:
    """(taps, len) -> (taps, len) int64: place of each score in its tap's ascending order, from 1."""
    out = torch.zeros_like(scores)
    for tap, row in enumerate(scores.tolist()):
        order = sorted(range(len(row)), key=lambda i: (row[i], -int(alone[i]), -i))
        out[tap, order] = torch.arange(1, len(row) + 1)
    return out


def static_order(importance: Tensor, alone: Tensor, rev: bool = False) -> list[int]:
    """One pass, nothing greedy: the least worth goes first (units, int64); ties as everywhere."""
    sign = -1 if rev else 1
    return sorted(range(len(importance)), key=lambda k: (sign * int(importance[k]), int(alone[k]), k))


def one_shot_order(
    bank: EstimatorBank, method: str, alone: Tensor, combine: str = "rank", rev: bool = False
) -> EliminationState:
    """A static order, nothing greedy: the channels with the least ``verb`` (alone, relevance) go first."""
    bank.begin(range(bank.width))
    importance = bank.sum_over_batches(method, range(bank.width))
    batch_count = bank.batches if bank.counted_batches is None else len(bank.counted_batches)
    scores = importance.sum(0).double() / batch_count / bank.unit
    if bank.taps > 1 and combine == "rank":
        importance = -ordinals(-importance, alone)
    order = static_order(importance.sum(0), alone, rev)
    return EliminationState(bank.width, order, [-float(scores[k]) for k in order], [0.0] * bank.width)

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
from dist_prune.pruning.information.estimators import WHOLE, EntropyEstimator

Make = Callable[[int, int, list[int]], EntropyEstimator]  # tap, batch, the channels that it answers for -> a judge
Share = Callable[[Sequence[Any], Callable[[Any], Any]], list[Any]]
UNIT = {torch.float64: 1e9, torch.float32: 1e6}  # of a bit; entropies in double precision are good to 1e-12
LEG = 64  # steps between two points where sums are made anew, and where an elimination can be resumed


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
    make: Make
    share: Share | None = None
    parts: int = 1
    counted: Sequence[int] | None = None
    unit: float = 1e9
    widths: Literal["fixed", "rests", "moving"] = "fixed"
    remaining: list[int] = field(default_factory=list)
    _judges: dict[tuple[int, int, int], EntropyEstimator] = field(default_factory=dict)

    def estimator(self, tap: int, batch: int, part: int = 0) -> EntropyEstimator:
        """The judge, made where it is first asked for."""
        key = (tap, batch, part)
        if key not in self._judges:
            own = list(range(part, self.width, self.parts if self.share else 1))
            self._judges[key] = self.make(tap, batch, own)
            if self.remaining:
                self._judges[key].begin(self.remaining)
        return self._judges[key]

    def call(self, verb: str, channels: Sequence[int], batches: Iterable[int] | None = None, more: Any = None) -> Any:
        """[tap][batch] -> tensor of ``verb``'s answers for ``channels``, or None where a judge has none."""
        numbers = list(range(self.batches) if batches is None else batches)
        table = [[None] * len(numbers) for _ in range(self.taps)]
        split = 1 if self.share is None else self.parts
        jobs = [(tap, batch, part) for tap in range(self.taps) for batch in numbers for part in range(split)]

        def run(job: tuple[int, int, int]) -> list[float] | None:
            tap, _, part = job
            places = [i for i, k in enumerate(channels) if max(k, 0) % split == part]
            mine = [channels[i] for i in places]
            extra = () if more is None else (more[tap][places],)
            answer = getattr(self.estimator(*job), verb)(mine, *extra) if mine else torch.zeros(0)
            return None if answer is None else answer.tolist()

        answers = [run(job) for job in jobs] if self.share is None else self.share(jobs, run)
        for (tap, batch, part), answer in zip(jobs, answers, strict=True):
            if answer is not None:
                row = numbers.index(batch)
                if table[tap][row] is None:
                    table[tap][row] = torch.zeros(len(channels), dtype=torch.float64)  # type: ignore[call-overload]
                table[tap][row][channels_of_share(channels, split, part)] = torch.tensor(answer, dtype=torch.float64)  # type: ignore[index]
        return table

    def units(self, verb: str, channels: Sequence[int], up: bool = False) -> Tensor | None:
        """(taps, counted batches, len) int64: answers in units; rounded ``up`` for bounds."""
        table = self.call(verb, channels, range(self.batches) if self.counted is None else self.counted)
        if any(row is None for rows in table for row in rows):
            return None
        answers = torch.stack([torch.stack(rows) for rows in table]) * self.unit
        return answers.ceil().long() + 1 if up else answers.round().long()

    def total(self, verb: str, channels: Sequence[int]) -> Tensor:
        """(taps, len) int64: answers in units, added over the counted batches."""
        found = self.units(verb, channels)
        assert found is not None
        return found.sum(1)

    def settle(self, channels: Sequence[int]) -> None:
        """Widths that the judges look for themselves: searched per batch, smoothed in the order of the batches."""
        sigmas = [smooth_over_batches(rows) for rows in self.call("search", channels)]
        for (tap, _, _), estimator in self._judges.items():
            estimator.settle(channels, sigmas[tap])

    def begin(self, remaining: Sequence[int]) -> None:
        self.remaining = list(remaining)
        for estimator in self._judges.values():
            estimator.begin(remaining)

    def remove(self, gone: Sequence[int]) -> None:
        self.remaining = [k for k in self.remaining if k not in set(gone)]
        for estimator in self._judges.values():
            estimator.remove(gone)

    @property
    def spectra(self) -> int:
        """Eigenvalue problems solved in this process."""
        return sum(estimator.spectra for estimator in self._judges.values())


def channels_of_share(channels: Sequence[int], parts: int, part: int) -> Tensor:
    """Positions of the channels that a part answers for; WHOLE belongs to the first."""
    return torch.tensor([i for i, k in enumerate(channels) if max(k, 0) % parts == part], dtype=torch.long)


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
        gone = set(self.order)
        return [k for k in range(self.width) if k not in gone]

    @property
    def done(self) -> bool:
        return len(self.order) >= self.width

    def tensor(self) -> Tensor:
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
        self, bank: EstimatorBank, alone: Tensor, state: EliminationState, steps: int = LEG
    ) -> EliminationState:
        """Up to ``steps`` more deletions; the last channel left ends the order.

        Args:
            alone: (width,) int64, entropy of each channel in units, for ties.
        """
        bank.begin(state.remaining)
        counted = bank.batches if bank.counted is None else len(bank.counted)
        for _ in range(steps):
            remaining = bank.remaining
            if not remaining:
                break
            if bank.widths != "fixed":
                bank.settle(remaining if bank.widths == "moving" else [WHOLE, *remaining])
            joint = bank.total("joint", [WHOLE])
            state.joints.append(float(joint.max()) / counted / bank.unit)
            if len(remaining) == 1:
                state.order += remaining
                state.scores.append(0.0)
                bank.remove(remaining)
                break
            count = min(max(1, math.ceil(self.step * len(remaining))), len(remaining) - 1)
            worst, scores = self._worst(bank, remaining, alone, count)
            state.joints += [state.joints[-1]] * (len(worst) - 1)
            state.order += worst
            state.scores += scores if self._ranks(bank) else [s / counted / bank.unit for s in scores]
            bank.remove(worst)
        return state

    def _ranks(self, bank: EstimatorBank) -> bool:
        return bank.taps > 1 and self.combine == "rank"

    def _worst(
        self, bank: EstimatorBank, remaining: list[int], alone: Tensor, count: int
    ) -> tuple[list[int], list[float]]:
        """The channels to delete, the worst first, and their scores in units (or sums of ordinals)."""
        sign = -1 if self.rev else 1
        plain = self.exhaustive or self.rev or self._ranks(bank)
        bounds = None if plain else bank.units("bound", remaining, up=True)
        if bounds is not None:
            found = self._best_first(bank, remaining, bounds, count)
        else:
            scores = bank.total("score", remaining)
            if self._ranks(bank):
                scores, sign = ordinals(sign * scores, alone[remaining]), 1
            found = dict(zip(remaining, (sign * scores.sum(0)).tolist(), strict=True))
        ties = alone.tolist()
        order = sorted(found, key=lambda k: (-found[k], ties[k], k))[:count]
        return order, [float(sign * found[k]) for k in order]

    def _best_first(self, bank: EstimatorBank, remaining: list[int], bounds: Tensor, count: int) -> dict[int, int]:
        """Exact scores of all candidates that may be among the ``count`` largest, most promising first."""
        upper = bounds.sum((0, 1)).tolist()
        promising = sorted(range(len(remaining)), key=lambda i: (-upper[i], remaining[i]))
        found: dict[int, int] = {}
        at_once = self.at_once if bank.share is not None else 1
        for start in range(0, len(promising), at_once):
            part = promising[start : start + at_once]
            bar = sorted(found.values(), reverse=True)[count - 1] if len(found) >= count else -math.inf
            if upper[part[0]] < bar:
                break
            chosen = [remaining[i] for i in part]
            if bank.share is None:
                exact = self._until(bank, chosen[0], bounds[:, :, part[0]], bar)
                found |= {} if exact is None else {chosen[0]: exact}
            else:
                found.update(zip(chosen, bank.total("score", chosen).sum(0).tolist(), strict=True))
        return found

    @staticmethod
    def _until(bank: EstimatorBank, channel: int, bounds: Tensor, bar: float) -> int | None:
        """The exact score, batch after batch; None as soon as it cannot reach the bar any more."""
        total = int(bounds.sum())
        for tap in range(bank.taps):
            for row, batch in enumerate(range(bank.batches) if bank.counted is None else bank.counted):
                exact = float(bank.estimator(tap, batch).score([channel])[0])
                total += round(exact * bank.unit) - int(bounds[tap, row])
                if total < bar:
                    return None
        return total


def ordinals(scores: Tensor, alone: Tensor) -> Tensor:
    """(taps, len) -> (taps, len) int64: place of each score in its tap's ascending order, from 1."""
    out = torch.zeros_like(scores)
    for tap, row in enumerate(scores.tolist()):
        order = sorted(range(len(row)), key=lambda i: (row[i], -int(alone[i]), -i))
        out[tap, order] = torch.arange(1, len(row) + 1)
    return out


def static_order(worth: Tensor, alone: Tensor, rev: bool = False) -> list[int]:
    """One pass, nothing greedy: the least worth goes first (units, int64); ties as everywhere."""
    sign = -1 if rev else 1
    return sorted(range(len(worth)), key=lambda k: (sign * int(worth[k]), int(alone[k]), k))


def one_shot_order(
    bank: EstimatorBank, verb: str, alone: Tensor, combine: str = "rank", rev: bool = False
) -> EliminationState:
    """A static order, nothing greedy: the channels with the least ``verb`` (alone, relevance) go first."""
    bank.begin(range(bank.width))
    worth = bank.total(verb, range(bank.width))
    counted = bank.batches if bank.counted is None else len(bank.counted)
    scores = worth.sum(0).double() / counted / bank.unit
    if bank.taps > 1 and combine == "rank":
        worth = -ordinals(-worth, alone)
    order = static_order(worth.sum(0), alone, rev)
    return EliminationState(bank.width, order, [-float(scores[k]) for k in order], [0.0] * bank.width)

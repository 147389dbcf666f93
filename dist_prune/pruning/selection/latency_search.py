"""The search for the largest network within a time: predictions say what to try, measured whole networks decide. Pure.

A table of single groups' times puts networks in order, but what they save together is not the sum: it overlaps, and the
noise of many groups adds up. So predictions go through the networks that were measured, and the search goes on between
the last one that is fast enough and the first one that is not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import DependencyGraph, LatencyTable
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.cost import macs, raw_time

ATTEMPTS = 6  # measurements of whole networks, up to three at once
SPREAD = (0.25, 0.5, 0.75)  # where the first ones lie between the smallest network and the dense one
EDGE = 0.01  # how near the smallest network the smallest of the method is looked for
STOP = 0.05  # how near is near enough where no tolerance is set
Times = Mapping[str, tuple[float, bool]]  # name -> share of the dense time, whether it is reliable
Measure = Callable[[Mapping[str, Plan]], Times]


@dataclass(frozen=True)
class MeasuredNetwork:
    """A network that was measured: its share of the dense time as the table adds it up (``raw``), as it was
    ``predicted`` (None before there were networks to predict from), and as it was ``measured``."""

    plan: Plan
    raw: float
    predicted: float | None
    measured: float
    reliable: bool


@dataclass
class LatencySearch:
    """One search.

    Attributes:
        graph: of the dense network.
        table: measured times of its groups, cut alone.
        asked: share of the dense time.
        tolerance: how far the measured share may be from it, as a share of it; None: as near as can be.
        least: the plan of the smallest network there can be.
        choose: the method's plan for channels with a table of times.
        measure: the times of whole networks, interleaved with the dense one.
        say: takes a line for the user.
    """

    graph: DependencyGraph
    table: LatencyTable
    target: float
    tolerance: float | None
    smallest: Plan
    choose: Callable[[DependencyGraph], Plan]
    measure: Measure
    say: Callable[[str], None]
    tried: dict[str, MeasuredNetwork] = field(default_factory=dict)

    def run(self) -> MeasuredNetwork:
        """The network that is taken: within the tolerance, or else the largest within the time, or else the fastest.

        Raises:
            PruneError: the smallest network there can be is too slow, by a time that can be relied on; or the method
                refuses whatever it is asked for.
        """
        lowest = self.raw_share(self.smallest)
        first = [self.plan_for(lowest + share * (1 - lowest)) for share in SPREAD]
        if lowest < 1 and not any(first):
            return self._refusal(lowest)
        self._time([self.smallest, *filter(None, first)])
        least = self.tried[self.smallest.fingerprint]
        if self.tolerance is not None and least.reliable and least.measured > self.target * (1 + self.tolerance):
            raise PruneError(
                f"target.latency: {self.target} cannot be reached on this device. With every free group at its floor "
                f"{least.measured:.4f} of the dense time is left (measured), so the reachable range is "
                f"{least.measured:.4f} to 1.0000. Raise the target, try a larger target.latency_batch (time follows "
                "operations better there), lower select.min_channels or select.round_to, or raise select.max_ratio."
            )
        for _ in range(ATTEMPTS):
            if self.within_tolerance(self.best):
                break
            plans = self._next()
            if not plans:  # nothing lies between what is fast enough and what is not
                break
            self._time(plans)
        return self.best

    def within_tolerance(self, one: MeasuredNetwork) -> bool:
        """Whether a network's time is known, and near enough to what was asked for."""
        near = STOP if self.tolerance is None else self.tolerance
        return one.reliable and abs(one.measured / self.target - 1) <= near

    @property
    def best(self) -> MeasuredNetwork:
        """Of those near enough, or else of all: the slowest that is within the time, or else the fastest. Never
        ``least``, whose channels nobody chose, while there are others."""

        def rank(one: MeasuredNetwork) -> tuple[bool, bool, float]:
            return not self.within_tolerance(one), one.measured > self.target, abs(one.measured - self.target)

        chosen = [one for one in self.tried.values() if one.plan is not self.smallest]
        return min(chosen or self.tried.values(), key=rank)

    def _refusal(self, lowest: float) -> MeasuredNetwork:
        """What the method says to a network halfway: an error, which is the user's."""
        self._time([self.choose(self.corrected(self.raw_shares_for((lowest + 1) / 2)))])
        return self.best

    def raw_share(self, plan: Plan) -> float:
        """What the table says, bent by nothing."""
        return raw_time(self.graph, self.table, plan.counts)

    def corrected(self, points: Sequence[tuple[float, float]]) -> DependencyGraph:
        """The channels with a table whose predictions go through (raw, share) points and (1, 1)."""
        return replace(self.graph, latency=replace(self.table, corrections=(*points, (1.0, 1.0))))

    def plan_for(self, raw: float) -> Plan | None:
        """The plan whose raw prediction is at most ``raw``; None where the method has none."""
        if not self.raw_share(self.smallest) < raw < 1:
            return None
        try:
            return self.choose(self.corrected(self.raw_shares_for(raw)))
        except PruneError:
            return None

    def raw_shares_for(self, raw: float) -> list[tuple[float, float]]:
        """Points by which a network of this raw share takes just the time that was asked for."""
        lowest = self.raw_share(self.smallest)
        return [*([(lowest, self.target / 2)] if lowest < raw else []), *([(raw, self.target)] if raw < 1 else [])]

    def curve(self) -> list[tuple[float, float]]:
        """(raw, share) through the measured networks, ascending in both."""
        points = sorted((one.raw, min(one.measured, 1.0)) for one in self.tried.values() if one.raw < 1)
        merged = {raw: [m for r, m in points if r == raw] for raw, _ in points}
        shares = isotonic([sum(of) / len(of) for of in merged.values()])
        return list(zip(merged, shares, strict=True))

    def _next(self) -> list[Plan]:
        """Plans that were not measured: the predicted one, and those halfway to what brackets it. Also a network that
        would be taken, if its time could be relied on."""
        curve, found = self.curve(), [] if self.best.reliable else [self.best.plan]
        below = max((raw for raw, share in curve if share <= self.target), default=self.raw_share(self.smallest))
        above = min((raw for raw, share in curve if share > self.target), default=1.0)
        try:
            middle = self.choose(self.corrected(curve))
        except PruneError:  # by what was measured meanwhile, the target is out of reach
            lowest = self.raw_share(self.smallest)
            middle = self.plan_for(lowest + EDGE * (1 - lowest))
        place = self.raw_share(middle) if middle is not None else (below + above) / 2
        for plan in (
            middle,
            self.plan_for((below + place) / 2),
            self.plan_for((place + above) / 2),
            self.plan_for((below + above) / 2),
        ):
            seen = self.tried.get(plan.fingerprint) if plan is not None else None
            if plan is not None and plan not in found and (seen is None or seen.plan is self.smallest):
                found.append(plan)
        return found[:3]

    def _time(self, plans: Sequence[Plan]) -> None:
        """Measure plans; a network that removes nothing is the dense one."""
        known = self.corrected(self.curve()).latency if self.tried else None
        new = {plan.fingerprint: plan for plan in plans}
        times = self.measure({key: plan for key, plan in new.items() if not plan.empty})
        for key, plan in new.items():
            measured, reliable = (1.0, True) if plan.empty else times[key]
            raw = self.raw_share(plan)
            predicted = None if known is None else known.correct(raw)
            self.tried[key] = MeasuredNetwork(plan, raw, predicted, measured, reliable)
            left = macs(self.graph, plan.counts) / macs(self.graph)
            told = "" if predicted is None else f"{predicted:.1%} predicted, "
            note = "" if reliable else " (not reliable)"
            self.say(f"latency: {told}{measured:.1%} of the dense time measured{note}, with {left:.1%} of the MACs")


def isotonic(values: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls (pool adjacent violators): noise is averaged, not added up."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (low, few), (high, many) = blocks.pop(), blocks.pop()
            blocks.append(((low * few + high * many) / (few + many), few + many))
    return [value for value, count in blocks for _ in range(count)]

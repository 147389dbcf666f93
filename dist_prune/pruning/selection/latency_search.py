"""Search for the largest network within a time: predictions propose networks, measurements of them decide.

A table of the times of single groups puts networks in order. The sum of the time that groups save alone predicts no
time: the savings overlap, and the noise of many groups adds up. Therefore predictions interpolate between measured
networks, and the search continues between the slowest network that is fast enough and the fastest one that is not.
The search itself measures nothing: the caller's ``measure`` does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.graph.known_costs import LatencyTable
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.cost import macs, raw_time

ATTEMPTS = 6  # measurements of whole networks, up to three at once
SPREAD = (0.25, 0.5, 0.75)  # positions of the first networks between the smallest network and the dense one
EDGE = 0.01  # position of the network that is tried if the target seems out of reach, likewise
STOP = 0.05  # tolerance at which the search ends if the recipe sets none
Times = Mapping[str, tuple[float, bool]]  # name -> share of the dense time, whether it is reliable
Measure = Callable[[Mapping[str, Plan]], Times]


@dataclass(frozen=True)
class MeasuredNetwork:
    """A network that was measured; all times are shares of the dense network's time.

    Attributes:
        plan: the plan of the network, in coordinates of the dense network.
        raw: sum of the table (``cost.raw_time``).
        predicted: prediction from the networks measured before; None for the first ones.
        measured: measured time.
        reliable: whether the measurement is reliable.
    """

    plan: Plan
    raw: float
    predicted: float | None
    measured: float
    reliable: bool


@dataclass
class LatencySearch:
    """One search for a latency target.

    Attributes:
        graph: dependency graph of the dense network.
        table: measured times of its groups, each cut alone.
        target: share of the dense time, in (0, 1).
        tolerance: how far the measured share may be from the target, as a share of the target; None: as near as the
            search gets.
        smallest: plan of the smallest network that the recipe allows.
        choose: makes the method's plan for a graph with a latency table; raises PruneError if it refuses the target.
        measure: measures whole networks, interleaved with the dense one: key -> plan in, key -> (share of the dense
            time, whether it is reliable) out.
        report_line: takes a line of text for the user.
        tried: plan fingerprint -> measured network, filled by ``run``.
    """

    graph: DependencyGraph
    table: LatencyTable
    target: float
    tolerance: float | None
    smallest: Plan
    choose: Callable[[DependencyGraph], Plan]
    measure: Measure
    report_line: Callable[[str], None]
    tried: dict[str, MeasuredNetwork] = field(default_factory=dict)

    def run(self) -> MeasuredNetwork:
        """Run the search.

        Returns:
            The network within the tolerance, or else the slowest within the time, or else the fastest.

        Raises:
            PruneError: the smallest network that the recipe allows is too slow by a reliable measurement, or the method
                refuses every target.
        """
        lowest = self.raw_share(self.smallest)
        first = [self.plan_for(lowest + share * (1 - lowest)) for share in SPREAD]
        if lowest < 1 and not any(first):
            return self._raise_refusal(lowest)
        self._measure([self.smallest, *filter(None, first)])
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
            plans = self._next_plans()
            if not plans:  # no network lies between those that are fast enough and those that are not
                break
            self._measure(plans)
        return self.best

    def within_tolerance(self, network: MeasuredNetwork) -> bool:
        """Whether a network's time is reliable and within the tolerance of the target."""
        near = STOP if self.tolerance is None else self.tolerance
        return network.reliable and abs(network.measured / self.target - 1) <= near

    @property
    def best(self) -> MeasuredNetwork:
        """The slowest network within the time, or else the fastest, of those within the tolerance or else of all.

        ``smallest`` is the best only if there is no other, because no method chose its channels.
        """

        def rank(network: MeasuredNetwork) -> tuple[bool, bool, float]:
            return (
                not self.within_tolerance(network),
                network.measured > self.target,
                abs(network.measured - self.target),
            )

        chosen = [network for network in self.tried.values() if network.plan is not self.smallest]
        return min(chosen or self.tried.values(), key=rank)

    def _raise_refusal(self, lowest: float) -> MeasuredNetwork:
        """Ask the method for a network halfway without catching its error, which tells the user the reason."""
        self._measure([self.choose(self.with_corrections(self.corrections_for((lowest + 1) / 2)))])
        return self.best

    def raw_share(self, plan: Plan) -> float:
        """Return the sum of the table for a plan, without corrections."""
        return raw_time(self.graph, self.table, plan.counts)

    def with_corrections(self, points: Sequence[tuple[float, float]]) -> DependencyGraph:
        """Return the graph with a table whose predictions go through (raw, share) points and (1, 1)."""
        return replace(self.graph, latency=replace(self.table, corrections=(*points, (1.0, 1.0))))

    def plan_for(self, raw: float) -> Plan | None:
        """Return the method's plan whose raw share is at most ``raw``; None if the method has none."""
        if not self.raw_share(self.smallest) < raw < 1:
            return None
        try:
            return self.choose(self.with_corrections(self.corrections_for(raw)))
        except PruneError:
            return None

    def corrections_for(self, raw: float) -> list[tuple[float, float]]:
        """Return the (raw, share) points by which a network of this raw share takes exactly the target's time."""
        lowest = self.raw_share(self.smallest)
        return [*([(lowest, self.target / 2)] if lowest < raw else []), *([(raw, self.target)] if raw < 1 else [])]

    def curve(self) -> list[tuple[float, float]]:
        """Return (raw, measured share) of the measured networks, ascending in both."""
        points = sorted((network.raw, min(network.measured, 1.0)) for network in self.tried.values() if network.raw < 1)
        merged = {raw: [m for r, m in points if r == raw] for raw, _ in points}
        shares = isotonic([sum(of) / len(of) for of in merged.values()])
        return list(zip(merged, shares, strict=True))

    def _next_plans(self) -> list[Plan]:
        """Return plans to measure next: the predicted one, and those halfway to the networks that bracket it.

        The best network is among them if its time is not reliable.
        """
        curve = self.curve()
        plans = [] if self.best.reliable else [self.best.plan]
        below = max((raw for raw, share in curve if share <= self.target), default=self.raw_share(self.smallest))
        above = min((raw for raw, share in curve if share > self.target), default=1.0)
        try:
            middle = self.choose(self.with_corrections(curve))
        except PruneError:  # by the measurements so far, the target is out of reach
            lowest = self.raw_share(self.smallest)
            middle = self.plan_for(lowest + EDGE * (1 - lowest))
        position = self.raw_share(middle) if middle is not None else (below + above) / 2
        for plan in (
            middle,
            self.plan_for((below + position) / 2),
            self.plan_for((position + above) / 2),
            self.plan_for((below + above) / 2),
        ):
            known = self.tried.get(plan.fingerprint) if plan is not None else None
            if plan is not None and plan not in plans and (known is None or known.plan is self.smallest):
                plans.append(plan)
        return plans[:3]

    def _measure(self, plans: Sequence[Plan]) -> None:
        """Measure plans and report them; an empty plan is the dense network and is not measured."""
        table = self.with_corrections(self.curve()).latency if self.tried else None
        new = {plan.fingerprint: plan for plan in plans}
        times = self.measure({key: plan for key, plan in new.items() if not plan.empty})
        for key, plan in new.items():
            measured, reliable = (1.0, True) if plan.empty else times[key]
            raw = self.raw_share(plan)
            predicted = None if table is None else table.correct(raw)
            self.tried[key] = MeasuredNetwork(plan, raw, predicted, measured, reliable)
            macs_left = macs(self.graph, plan.counts) / macs(self.graph)
            prediction = "" if predicted is None else f"{predicted:.1%} predicted, "
            note = "" if reliable else " (not reliable)"
            self.report_line(
                f"latency: {prediction}{measured:.1%} of the dense time measured{note}, "
                f"with {macs_left:.1%} of the MACs"
            )


def isotonic(values: Sequence[float]) -> list[float]:
    """Return the nearest non-decreasing sequence (isotonic regression by pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (low, few), (high, many) = blocks.pop(), blocks.pop()
            blocks.append(((low * few + high * many) / (few + many), few + many))
    return [value for value, count in blocks for _ in range(count)]

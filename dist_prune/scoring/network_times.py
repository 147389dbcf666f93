"""Measured times of a network's groups and of whole pruned networks, and the search for a latency target by them."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.pruning.graph.blocks import Block
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
from dist_prune.pruning.graph.known_costs import LatencyTable
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.latency_search import LatencySearch, Times, isotonic
from dist_prune.pruning.selection.ranking import SelectionRequest, smallest_counts
from dist_prune.pruning.surgery import surgeon
from dist_prune.training.latency import ROUNDS, measure_latency
from dist_prune.training.timing_noise import is_reliable

DENSE = ""  # its name among the networks that are timed
SHARES = (0.75, 0.5, 0.25)  # shares of a group's width that are measured, beside the dense width and the floor
GroupTimes = dict[str, list[list[float]]]  # group -> [[kept channels, share of the dense time], ...], ascending


@dataclass(frozen=True)
class NetworkTimes:
    """What is timed, and how. Only the first rank measures; the others are told.

    Attributes:
        model: the dense network in evaluation mode.
        graph: its dependency graph.
        request: the selection, whose floors and rounding the measured widths respect.
        environment: device of the passes, and the ranks that get the answers.
        batch: number of images of a pass.
        repeats: timed passes of each network.
        threads: CPU threads of a pass.
        info: takes a line of text for the user.
    """

    model: nn.Module
    graph: DependencyGraph
    request: SelectionRequest
    environment: DistributedEnvironment
    batch: int
    repeats: int
    threads: int
    info: Callable[[str], None]

    def widths(self) -> dict[str, list[int]]:
        """Free group -> the widths that ``of_groups`` measures; block that may go -> [0]."""
        widths = {group.name: measured_widths(group, self.request) for group in self.graph.free}
        return widths | {block.key: [0] for block in self.blocks}

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The residual blocks that may go."""
        return self.graph.free_blocks if self.request.depth else ()

    def of_groups(self) -> GroupTimes:
        """Measure each free group cut alone to some widths; one rank calls it."""
        times = {}
        for group in self.graph.free:
            widths = measured_widths(group, self.request)
            cuts = {str(w): self._plan({group.name: tuple(range(w, group.width))}) for w in widths}
            shares = self._measure(cuts, rounds=1)  # an estimate: whole networks are measured in more rounds
            times[group.name] = monotone([[w, shares[str(w)][0]] for w in widths] + [[group.width, 1.0]])
        for block in self.blocks:
            share = self._measure({block.path: self._plan({}, (block.path,))}, rounds=1)[block.path][0]
            times[block.key] = [[0, min(share, 1.0)], [1, 1.0]]
        return times

    def _plan(self, removed: Mapping[str, tuple[int, ...]], blocks: tuple[str, ...] = ()) -> Plan:
        return Plan(removed, {group.name: group.width for group in self.graph.groups}, blocks_removed=blocks)

    def search(
        self, times: GroupTimes, target: float, tolerance: float | None, choose: Callable[[DependencyGraph], Plan]
    ) -> tuple[Plan, dict[str, Any]]:
        """Find the largest network whose measured time is within a target (see ``LatencySearch``).

        Args:
            times: of ``of_groups``, the same on every rank.
            target: share of the dense time, in (0, 1).
            tolerance: how far the measured share may be from it, as a share of the target; None: as near as possible.
            choose: maps a graph that carries times to the method's plan.

        Returns:
            The plan, and how it was found: ``predicted`` and ``measured`` shares of the dense time, whether the time is
            ``reliable``, the ``smallest`` share measured, all that was ``tried``, and how times were measured.

        Raises:
            PruneError: no network is that fast.
        """
        table = LatencyTable({name: tuple((int(w), float(s)) for w, s in points) for name, points in times.items()})

        counts = smallest_counts(self.graph, self.request)
        smallest = Plan.from_kept(self.graph, {name: list(range(count)) for name, count in counts.items()})
        search = LatencySearch(self.graph, table, target, tolerance, smallest, choose, self.of_plans, self.info)
        result = search.run()
        return result.plan, {
            "predicted": result.predicted,
            "measured": result.measured,
            "reliable": result.reliable,
            "smallest": min(trial.measured for trial in search.tried.values()),
            "tried": [[trial.predicted, trial.measured] for trial in search.tried.values()],
            "batch": self.batch,
            "device": str(self.environment.device),
            "threads": self.threads,
            "repeats": self.repeats,
            "times": times,
            "bend": [*search.corrections_for(result.raw), (1.0, 1.0)],
        }

    def of_plans(self, plans: Mapping[str, Plan]) -> Times:
        """Measure pruned networks on the first rank; a collective.

        Args:
            plans: name -> plan that removes something.

        Returns:
            Name -> share of the dense time, and whether it is reliable.
        """
        comm = self.environment.comm
        return comm.broadcast_object(comm.run_on_main(lambda: self._measure(plans))) or {}

    def _measure(self, plans: Mapping[str, Plan], rounds: int = ROUNDS) -> dict[str, tuple[float, bool]]:
        """Share of the dense time of pruned networks, and whether it is reliable; in turns with the dense one."""
        if not plans:
            return {}
        models = {DENSE: self.model}
        for name, plan in plans.items():
            models[name] = copy.deepcopy(self.model)
            surgeon.apply_plan(models[name], self.graph, plan)
        found = measure_latency(
            models, self.graph.example, (self.batch,), self.repeats, self.environment.device, self.threads,
            rounds=rounds,
        )  # fmt: skip
        at_batch = {name: batches[str(self.batch)] for name, batches in found.items()}
        dense = at_batch[DENSE]
        return {
            name: (at_batch[name]["ms"] / dense["ms"], is_reliable(dense) and is_reliable(at_batch[name]))
            for name in plans
        }


def measured_widths(group: ChannelGroup, request: SelectionRequest) -> list[int]:
    """The widths of a group to measure, ascending, all below the dense one.

    Args:
        group: The channel group.
        request: The selection, whose floors and rounding the widths respect.
    """
    floor = request.width(group, 1)
    widths = {floor, *(request.width(group, round(group.width * share)) for share in SHARES)}
    return sorted(width for width in widths if width < group.width)


def monotone(points: list[list[float]]) -> list[list[float]]:
    """Make measured times non-decreasing in the number of channels, by isotonic regression.

    Falling neighbours are averaged. Taking the smaller of two would be a little too fast each time, and the errors of
    many groups add up.

    Args:
        points: [kept channels, share of the dense time], ascending; the last one is the dense network and stays.
    """
    shares = isotonic([share for _, share in points[:-1]])
    limit = points[-1][1]
    return [[width, min(share, limit)] for (width, _), share in zip(points, [*shares, limit], strict=True)]


def missed_time(timed: Mapping[str, Any], target: float, tolerance: float | None) -> str:
    """Why a measured time misses its target by more than is tolerated, or is unreliable; else empty.

    Args:
        timed: the second result of ``NetworkTimes.search``.
        target: share of the dense time.
        tolerance: largest miss as a share of the target; None: any is accepted.
    """
    if tolerance is None:
        return ""
    deviation = timed["measured"] / target - 1
    figures = f"{target:.4g} was asked for, {timed['measured']:.4g} was measured, {deviation:+.1%}"
    if not timed["reliable"]:
        return f"{figures}, and that time is not reliable: other work used the machine whenever it was measured"
    if abs(deviation) <= tolerance:
        return ""
    return (
        f"{figures}, more than target.latency_tolerance {tolerance:.1%}. Of {len(timed['tried'])} whole networks that "
        f"were measured none is nearer, and the fastest takes {timed['smallest']:.4g} of the dense time"
    )

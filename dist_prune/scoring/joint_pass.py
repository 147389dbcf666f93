"""Several methods scored in one pass over the images: what they observe is observed together.

A method's ``score`` is run until it asks for an observation; when all have asked, the images go through the network
once for all of them, and each method is run again with its answer. Scores are those of a method alone, bit for bit.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dist_prune.config.compatibility import first_class_name
from dist_prune.pruning.graph.groups import DependencyGraph, HookPoint
from dist_prune.pruning.hooks.statistics import State, Statistic
from dist_prune.scoring.context import DistributedScoringContext

Tables = dict[str, dict[str, Tensor]]
Scores = dict[str, Tensor]


class ScoresNetwork(Protocol):
    """What is needed of a method."""

    def score(self, context: Any) -> Scores: ...

    def prunable(self, graph: DependencyGraph) -> DependencyGraph: ...


@dataclass(frozen=True)
class StatisticRequest:
    """One observation that a method asks for."""

    points: tuple[HookPoint, ...]
    statistic: Statistic
    backward: bool
    view: tuple[tuple[str, bool], ...]  # how the images are looked at: keyword arguments of observe

    @property
    def alone(self) -> bool:
        """Second derivatives belong to the weights of one statistic."""
        return type(self.statistic).direction is not Statistic.direction

    def __repr__(self) -> str:
        """The same in every process: a partial observation is known by it."""
        settings = sorted((name, repr(value)) for name, value in vars(self.statistic).items())
        return (
            f"{first_class_name(self.statistic)}{settings} at {[point.name for point in self.points]} {self.backward}"
        )


class _Pending(BaseException):
    """A method has asked for what is not there yet; no method catches this."""

    def __init__(self, ask: StatisticRequest):
        super().__init__()
        self.ask = ask


class _ReplayContext:
    """The bench, with observations answered from a list."""

    def __init__(self, bench: DistributedScoringContext, graph: DependencyGraph, answers: Sequence[Tables]):
        self._bench, self._answers = bench, iter(answers)
        self.graph, self.sites = graph, graph.hook_points

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bench, name)

    def collect(
        self, points: Sequence[HookPoint], statistic: Statistic, backward: bool = False, **view: bool
    ) -> Tables:
        found = next(self._answers, None)
        if found is None:
            raise _Pending(StatisticRequest(tuple(points), statistic, backward, tuple(sorted(view.items()))))
        return found


class JointStatistic(Statistic):
    """Statistics of several methods as one; the states are ``<method>/<state>``."""

    def __init__(self, asks: Mapping[str, StatisticRequest]):
        self.asks = dict(asks)

    @property
    def sites(self) -> list[HookPoint]:
        """Each site once."""
        return list({point.name: point for ask in self.asks.values() for point in ask.points}.values())

    def _at(self, point: HookPoint) -> dict[str, tuple[StatisticRequest, HookPoint]]:
        """Who looks here, with the site as it was asked for."""
        found = {}
        for name, ask in self.asks.items():
            own = next((other for other in ask.points if other.name == point.name), None)
            if own is not None:
                found[name] = (ask, own)
        return found

    def states(self, point: HookPoint) -> dict[str, State]:
        return {
            f"{name}/{state}": made
            for name, (ask, own) in self._at(point).items()
            for state, made in ask.statistic.states(own).items()
        }

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        for name, (ask, own) in self._at(point).items():
            mine = {state: tables[f"{name}/{state}"] for state in ask.statistic.states(own)}
            ask.statistic.update(own, mine, maps, ids, grads if ask.backward else None)
            tables.update({f"{name}/{state}": table for state, table in mine.items()})

    def split_for(self, found: Tables, name: str) -> Tables:
        """What one method gets of the merged tables."""
        states = {point.name: self.asks[name].statistic.states(point) for point in self.asks[name].points}
        return {site: {state: found[site][f"{name}/{state}"] for state in own} for site, own in states.items()}


def score_many(bench: DistributedScoringContext, methods: Mapping[str, ScoresNetwork]) -> dict[str, Scores]:
    """Method -> its scores, in the order of ``methods``."""
    answers: dict[str, list[Tables]] = {name: [] for name in methods}
    done: dict[str, Scores] = {}
    while len(done) < len(methods):
        asked: dict[str, StatisticRequest] = {}
        for name, method in methods.items():
            if name not in done:
                try:
                    done[name] = method.score(_ReplayContext(bench, method.prunable(bench.graph), answers[name]))
                except _Pending as pending:
                    asked[name] = pending.ask
        for asks in _passes(asked):
            together = JointStatistic(asks)
            backward = any(ask.backward for ask in asks.values())
            if len(asks) == 1:
                ((name, ask),) = asks.items()
                answers[name].append(bench.collect(ask.points, ask.statistic, ask.backward, **dict(ask.view)))
                continue
            view = dict(next(iter(asks.values())).view)
            found = bench.collect(together.sites, together, backward, **view)
            for name in asks:
                answers[name].append(together.split_for(found, name))
    return {name: done[name] for name in methods}


def _passes(asked: Mapping[str, StatisticRequest]) -> list[dict[str, StatisticRequest]]:
    """Who is observed together: all who look at the images in the same way."""
    passes: dict[Any, dict[str, StatisticRequest]] = {}
    for name, ask in asked.items():
        passes.setdefault((ask.view, name if ask.alone else ""), {})[name] = ask
    return list(passes.values())

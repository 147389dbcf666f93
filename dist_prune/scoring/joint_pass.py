"""Several methods scored in one pass over the images: their statistics are collected together.

A method's ``score`` runs until it calls ``collect``. When all methods have done so, the images go through the network
once for all of them, and each method runs again from the beginning with its tables. The scores are those of a method
alone, bit for bit.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dist_prune.pruning.graph.groups import DependencyGraph, HookPoint
from dist_prune.pruning.hooks.statistics import State, Statistic
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.scoring.statistic_collection import first_class_name

Tables = dict[str, dict[str, Tensor]]  # hook point name -> state name -> merged table
Scores = dict[str, Tensor]


class ScoresNetwork(Protocol):
    """The part of ``methods.base.Method`` that scoring needs."""

    def score(self, context: Any) -> Scores:
        """Named tensors on the CPU, the same on every rank."""
        ...

    def prunable(self, graph: DependencyGraph) -> DependencyGraph:
        """The graph in which the groups that the method cannot score are protected."""
        ...


@dataclass(frozen=True)
class StatisticRequest:
    """A call of ``collect`` that a method made.

    Attributes:
        points: the hook points.
        statistic: what is computed at each of them.
        backward: whether it needs gradients.
        view: further keyword arguments (``train_mode``, ``augment``), sorted by name.
    """

    points: tuple[HookPoint, ...]
    statistic: Statistic
    backward: bool
    view: tuple[tuple[str, bool], ...]

    @property
    def needs_own_pass(self) -> bool:
        """Whether the statistic uses second derivatives, which belong to the weights of one statistic."""
        return type(self.statistic).direction is not Statistic.direction

    def __repr__(self) -> str:
        """The same in every process: it identifies a partial file."""
        settings = sorted((name, repr(value)) for name, value in vars(self.statistic).items())
        return (
            f"{first_class_name(self.statistic)}{settings} at {[point.name for point in self.points]} {self.backward}"
        )


class _TablesNeeded(BaseException):
    """A method has called ``collect`` for tables that are not there yet; no method catches this."""

    def __init__(self, request: StatisticRequest):
        super().__init__()
        self.request = request


class _ReplayContext:
    """The scoring context, with calls of ``collect`` answered from a list of tables."""

    def __init__(self, context: DistributedScoringContext, graph: DependencyGraph, answers: Sequence[Tables]):
        self._context, self._answers = context, iter(answers)
        self.graph, self.hook_points = graph, graph.hook_points

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def collect(
        self, points: Sequence[HookPoint], statistic: Statistic, backward: bool = False, **view: bool
    ) -> Tables:
        tables = next(self._answers, None)
        if tables is None:
            raise _TablesNeeded(StatisticRequest(tuple(points), statistic, backward, tuple(sorted(view.items()))))
        return tables


class JointStatistic(Statistic):
    """The statistics of several methods as one.

    State names are ``<method>/<state>``.

    Args:
        asks: method name -> its request; all with the same ``view``. The name of the attribute is part of the identity
            of partial files.
    """

    def __init__(self, asks: Mapping[str, StatisticRequest]):
        self.asks = dict(asks)

    @property
    def points(self) -> list[HookPoint]:
        """The hook points of all requests, each name once."""
        return list({point.name: point for request in self.asks.values() for point in request.points}.values())

    def _requests_at(self, point: HookPoint) -> dict[str, tuple[StatisticRequest, HookPoint]]:
        """Method -> its request, if it names this hook point, and the point as the method gave it."""
        requests = {}
        for name, request in self.asks.items():
            own = next((other for other in request.points if other.name == point.name), None)
            if own is not None:
                requests[name] = (request, own)
        return requests

    def states(self, point: HookPoint) -> dict[str, State]:
        return {
            f"{name}/{key}": state
            for name, (request, own) in self._requests_at(point).items()
            for key, state in request.statistic.states(own).items()
        }

    def update(
        self, point: HookPoint, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        for name, (request, own) in self._requests_at(point).items():
            own_tables = {key: tables[f"{name}/{key}"] for key in request.statistic.states(own)}
            request.statistic.update(own, own_tables, maps, ids, grads if request.backward else None)
            tables.update({f"{name}/{key}": table for key, table in own_tables.items()})

    def split_for(self, tables: Tables, name: str) -> Tables:
        """The tables of one method, under its own state names.

        Args:
            tables: merged tables of the joint statistic.
            name: of the method.
        """
        states = {point.name: self.asks[name].statistic.states(point) for point in self.asks[name].points}
        return {point: {key: tables[point][f"{name}/{key}"] for key in keys} for point, keys in states.items()}


def score_many(context: DistributedScoringContext, methods: Mapping[str, ScoresNetwork]) -> dict[str, Scores]:
    """Score a network by several methods, with as few passes over the images as possible. Collective.

    Args:
        context: the network and the calibration images, which are the same for all methods.
        methods: name -> method.

    Returns:
        Method name -> its scores, in the order of ``methods``.

    Raises:
        PruneError: a method cannot score this network.
        PreemptedError: the run was asked to stop.
    """
    answers: dict[str, list[Tables]] = {name: [] for name in methods}
    scores: dict[str, Scores] = {}
    while len(scores) < len(methods):
        requests: dict[str, StatisticRequest] = {}
        for name, method in methods.items():
            if name not in scores:
                try:
                    scores[name] = method.score(_ReplayContext(context, method.prunable(context.graph), answers[name]))
                except _TablesNeeded as needed:
                    requests[name] = needed.request
        for together in _group_by_pass(requests):
            joint = JointStatistic(together)
            backward = any(request.backward for request in together.values())
            if len(together) == 1:
                ((name, request),) = together.items()
                tables = context.collect(request.points, request.statistic, request.backward, **dict(request.view))
                answers[name].append(tables)
                continue
            view = dict(next(iter(together.values())).view)
            tables = context.collect(joint.points, joint, backward, **view)
            for name in together:
                answers[name].append(joint.split_for(tables, name))
    return {name: scores[name] for name in methods}


def _group_by_pass(requests: Mapping[str, StatisticRequest]) -> list[dict[str, StatisticRequest]]:
    """The requests that one pass serves: those with the same view of the images."""
    passes: dict[Any, dict[str, StatisticRequest]] = {}
    for name, request in requests.items():
        passes.setdefault((request.view, name if request.needs_own_pass else ""), {})[name] = request
    return list(passes.values())

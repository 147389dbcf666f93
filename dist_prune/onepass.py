"""Several methods scored in one pass over the images: what they observe is observed together.

A method's ``score`` is run until it asks for an observation; when all have asked, the images go through the network
once for all of them, and each method is run again with its answer. Scores are those of a method alone, bit for bit.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dist_prune.bench import Bench
from dist_prune.pruning.channels import Channels, Site
from dist_prune.pruning.statistic import State, Statistic

Tables = dict[str, dict[str, Tensor]]
Scores = dict[str, Tensor]


class Scoring(Protocol):
    """What is needed of a method."""

    def score(self, bench: Any) -> Scores: ...

    def limits(self, channels: Channels) -> Channels: ...


@dataclass(frozen=True)
class Ask:
    """One observation that a method asks for."""

    sites: tuple[Site, ...]
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
        return f"{type(self.statistic).__name__}{settings} at {[site.name for site in self.sites]} {self.backward}"


class _Pending(BaseException):
    """A method has asked for what is not there yet; no method catches this."""

    def __init__(self, ask: Ask):
        super().__init__()
        self.ask = ask


class _Replay:
    """The bench, with observations answered from a list."""

    def __init__(self, bench: Bench, channels: Channels, answers: Sequence[Tables]):
        self._bench, self._answers = bench, iter(answers)
        self.channels, self.sites = channels, channels.sites

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bench, name)

    def observe(self, sites: Sequence[Site], statistic: Statistic, backward: bool = False, **view: bool) -> Tables:
        found = next(self._answers, None)
        if found is None:
            raise _Pending(Ask(tuple(sites), statistic, backward, tuple(sorted(view.items()))))
        return found


class Several(Statistic):
    """Statistics of several methods as one; the states are ``<method>/<state>``."""

    def __init__(self, asks: Mapping[str, Ask]):
        self.asks = dict(asks)

    @property
    def sites(self) -> list[Site]:
        """Each site once."""
        return list({site.name: site for ask in self.asks.values() for site in ask.sites}.values())

    def _at(self, site: Site) -> dict[str, tuple[Ask, Site]]:
        """Who looks here, with the site as it was asked for."""
        found = {}
        for name, ask in self.asks.items():
            own = next((other for other in ask.sites if other.name == site.name), None)
            if own is not None:
                found[name] = (ask, own)
        return found

    def states(self, site: Site) -> dict[str, State]:
        return {
            f"{name}/{state}": made
            for name, (ask, own) in self._at(site).items()
            for state, made in ask.statistic.states(own).items()
        }

    def update(
        self, site: Site, tables: MutableMapping[str, Tensor], maps: Tensor, ids: Tensor, grads: Tensor | None
    ) -> None:
        for name, (ask, own) in self._at(site).items():
            mine = {state: tables[f"{name}/{state}"] for state in ask.statistic.states(own)}
            ask.statistic.update(own, mine, maps, ids, grads if ask.backward else None)
            tables.update({f"{name}/{state}": table for state, table in mine.items()})

    def answer(self, found: Tables, name: str) -> Tables:
        """What one method gets of the merged tables."""
        states = {site.name: self.asks[name].statistic.states(site) for site in self.asks[name].sites}
        return {site: {state: found[site][f"{name}/{state}"] for state in own} for site, own in states.items()}


def score_many(bench: Bench, methods: Mapping[str, Scoring]) -> dict[str, Scores]:
    """Method -> its scores, in the order of ``methods``."""
    answers: dict[str, list[Tables]] = {name: [] for name in methods}
    done: dict[str, Scores] = {}
    while len(done) < len(methods):
        asked: dict[str, Ask] = {}
        for name, method in methods.items():
            if name not in done:
                try:
                    done[name] = method.score(_Replay(bench, method.limits(bench.channels), answers[name]))
                except _Pending as pending:
                    asked[name] = pending.ask
        for asks in _passes(asked):
            together = Several(asks)
            backward = any(ask.backward for ask in asks.values())
            if len(asks) == 1:
                ((name, ask),) = asks.items()
                answers[name].append(bench.observe(ask.sites, ask.statistic, ask.backward, **dict(ask.view)))
                continue
            view = dict(next(iter(asks.values())).view)
            found = bench.observe(together.sites, together, backward, **view)
            for name in asks:
                answers[name].append(together.answer(found, name))
    return {name: done[name] for name in methods}


def _passes(asked: Mapping[str, Ask]) -> list[dict[str, Ask]]:
    """Who is observed together: all who look at the images in the same way."""
    passes: dict[Any, dict[str, Ask]] = {}
    for name, ask in asked.items():
        passes.setdefault((ask.view, name if ask.alone else ""), {})[name] = ask
    return list(passes.values())

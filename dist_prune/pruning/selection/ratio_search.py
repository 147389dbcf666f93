"""Candidates of a search for the number of channels of each group: drawn, then varied from the best. Pure functions.

A candidate is decided by (seed, its number, the figures of earlier generations), never by ranks or time. All candidates
meet their target. Evolution after random draws, judged by held-out accuracy: Li et al., EagleEye,
ECCV 2020, draw ratios at random and judge them with recalibrated batch norms; the evolution after the draws is ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
from dist_prune.pruning.selection.ranking import SelectionRequest, cost_share, match_group

GENERATION = 20  # candidates that are made from the same figures; not the number of ranks, which decides nothing
DRAWN = 0.3  # share of the candidates that is drawn at random before evolution starts
ELITE = 8  # best candidates of a target that are varied
SPREADS = (0.2, 0.4, 0.8)  # of the logarithm of drawn shares around uniform ones
STEP = 0.25  # the same of a mutation
LEAST = 0.02  # smallest removed share, relative to the largest, that a candidate can have before its scale is fitted
ATTEMPTS = 20  # draws of a candidate that are equal to earlier ones before an equal one is taken
BISECTIONS = 40
Counts = tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """A network that is judged.

    Attributes:
        number: from 0; with the seed it decides what is drawn.
        target: share of the target's cost that it keeps at most.
        counts: kept channels of each free group.
        origin: ``uniform``, ``global``, ``isomorphic``, ``drawn``, ``varied`` or ``crossed``.
    """

    number: int
    target: float
    counts: Counts
    origin: str


@dataclass
class RatioSearch:
    """The candidates of one search.

    Attributes:
        graph: dependency graph of the network that is pruned, with times if the target is a latency.
        request: floors, caps, rounding, seed and target.
        targets: shares of the target's cost; the request's own comes first.
        total: number of candidates.
        starts: (origin, counts of one target), for each rule that makes a plan without a search; uniform comes first.
    """

    graph: DependencyGraph
    request: SelectionRequest
    targets: tuple[float, ...]
    total: int
    starts: Sequence[tuple[str, Callable[[float], Counts]]]
    _known: set[tuple[float, Counts]] = field(default_factory=set)

    def generation(self, made: Sequence[Candidate], figures: Mapping[int, float]) -> list[Candidate]:
        """Make the next candidates.

        Args:
            made: all candidates of earlier generations, in order.
            figures: number -> judged figure of each of them, larger is better.

        Returns:
            At most ``GENERATION`` of them; none if ``total`` are made.
        """
        self._known = {(candidate.target, candidate.counts) for candidate in made}
        new: list[Candidate] = []
        for number in range(len(made), min(len(made) + GENERATION, self.total)):
            candidate = self._candidate(number, made, figures)
            self._known.add((candidate.target, candidate.counts))
            new.append(candidate)
        return new

    def _candidate(self, number: int, made: Sequence[Candidate], figures: Mapping[int, float]) -> Candidate:
        target = self.targets[number % len(self.targets)]
        if number // len(self.targets) < len(self.starts):
            origin, counts_at = self.starts[number // len(self.targets)]
            return Candidate(number, target, counts_at(target), origin)
        evolves = number >= DRAWN * self.total and len(made) > 0
        candidate = None
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng([self.request.seed, 0x5EA2C4, number, attempt])
            if evolves:
                origin, shares = self._vary(target, rng, made, figures)
            else:
                origin, shares = "drawn", np.exp(SPREADS[number % len(SPREADS)] * rng.normal(size=len(self.graph.free)))
            candidate = Candidate(number, target, self.fit(target, shares, rng), origin)
            if (target, candidate.counts) not in self._known:
                break
        assert candidate is not None
        return candidate

    def _vary(
        self, target: float, rng: np.random.Generator, made: Sequence[Candidate], figures: Mapping[int, float]
    ) -> tuple[str, np.ndarray]:
        """Removed shares like those of one or two of the best candidates, of this target or of others."""
        own = best_of([c for c in made if c.target == target], figures)[:ELITE]
        others = [best_of([c for c in made if c.target == t], figures)[:2] for t in self.targets if t != target]
        pool = own or [candidate for few in others for candidate in few]
        if own and others and rng.random() < 0.2:
            pool = [candidate for few in others for candidate in few] or own
        weights = 1.0 / np.arange(1, len(pool) + 1)
        first, second = (pool[rng.choice(len(pool), p=weights / weights.sum())] for _ in range(2))
        shares, origin = self.removed_shares(first.counts), "varied"
        if first != second and rng.random() < 0.3:
            shares = np.where(rng.random(len(shares)) < 0.5, shares, self.removed_shares(second.counts))
            origin = "crossed"
        touched = rng.random(len(shares)) < 0.3
        touched[rng.integers(len(shares))] = True
        scale = STEP * rng.choice([0.5, 1.0, 2.0])
        return origin, np.clip(shares, LEAST, 1) * np.exp(touched * scale * rng.normal(size=len(shares)))

    def removed_shares(self, counts: Counts) -> np.ndarray:
        """(G,) share of each free group's dense channels that is gone."""
        return np.array([1 - k / g.dense for k, g in zip(counts, self.graph.free, strict=True)])

    def fit(self, target: float, shares: np.ndarray, rng: np.random.Generator) -> Counts:
        """Scale removed shares until the network just meets a target, then restore single steps that still fit.

        Args:
            target: share of the cost.
            shares: (G,) relative removed share of each free group, positive.
            rng: orders the groups that get steps back.
        """
        relative = np.clip(shares / shares.max(), LEAST, 1)
        low, high = 0.0, 1 / float(relative.min())  # at the upper end every group is at its floor
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.fits(target, self._scaled(relative, middle)) else (middle, high)
        return self._fill(target, self._scaled(relative, high), rng)

    def _scaled(self, relative: np.ndarray, scale: float) -> Counts:
        kept = 1 - np.minimum(1, scale * relative)
        return tuple(
            self.request.width(g, round(g.dense * float(k))) for g, k in zip(self.graph.free, kept, strict=True)
        )

    def fits(self, target: float, counts: Counts) -> bool:
        """Whether a network is within a target."""
        return self.share(counts) <= target

    def share(self, counts: Counts) -> float:
        """The share of the target's cost that a network keeps."""
        assert self.request.target is not None
        return cost_share(self.graph, self.request.target[0], self.kept(counts))

    def kept(self, counts: Counts) -> dict[str, int]:
        """Free group -> kept channels."""
        return {group.name: count for group, count in zip(self.graph.free, counts, strict=True)}

    def _fill(self, target: float, counts: Counts, rng: np.random.Generator) -> Counts:
        best, groups = list(counts), list(self.graph.free)
        open_groups = [
            i for i in rng.permutation(len(groups)) if match_group(self.request.keep_ratios, groups[i]) is None
        ]
        while open_groups:
            still = []
            for i in open_groups:
                more = [*best]
                more[i] = min(best[i] + self.request.multiple(groups[i]), groups[i].width)
                if more[i] > best[i] and self.fits(target, tuple(more)):
                    best, still = more, [*still, i]
            open_groups = still
        return tuple(best)


def best_of(candidates: Sequence[Candidate], figures: Mapping[int, float]) -> list[Candidate]:
    """Candidates by their figure, the best first; of equal ones the smaller number comes first."""
    return sorted(candidates, key=lambda candidate: (-figures[candidate.number], candidate.number))


def front_of(points: Mapping[int, tuple[float, float]]) -> list[int]:
    """The numbers of the candidates that no other one beats, by ascending cost.

    Args:
        points: number -> (share of the cost, figure; larger is better).

    Returns:
        Those for which no candidate of the same or a smaller cost has a figure as good.
    """
    front: list[int] = []
    for number in sorted(points, key=lambda n: (points[n][0], -points[n][1], n)):
        if not front or points[number][1] > points[front[-1]][1]:
            front.append(number)
    return front


def forward_passes(candidates: int, judged: int, repaired: int, micro_batch: int) -> tuple[int, int]:
    """The work of a search.

    Args:
        candidates: number of networks that are judged.
        judged: number of judging images.
        repaired: number of images of the repair.
        micro_batch: images of one forward pass.

    Returns:
        Forward passes of micro-batches, and images that pass through pruned networks.
    """
    passes = -(-judged // micro_batch) + -(-repaired // micro_batch)
    return candidates * passes, candidates * (judged + repaired)


def with_target(request: SelectionRequest, share: float) -> SelectionRequest:
    """The request with another share of the same cost."""
    assert request.target is not None
    return replace(request, target=(request.target[0], share))


def steps_of(group: ChannelGroup, request: SelectionRequest) -> list[int]:
    """The legal numbers of kept channels of a group, ascending.

    Args:
        group: a free group.
        request: its floor, cap, rounding and keep ratio.
    """
    return sorted({request.width(group, count) for count in range(1, group.width + 1)})

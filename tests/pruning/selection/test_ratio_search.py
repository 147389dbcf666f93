"""Candidates of a search: each is within its target and legal, and decided by its number alone."""

import numpy as np
import pytest

from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.selection.first_candidates import ratio_search
from dist_prune.pruning.selection.ranking import SelectionRequest, select_by_score
from dist_prune.pruning.selection.ratio_search import (
    Candidate,
    RatioSearch,
    best_of,
    forward_passes,
    front_of,
    steps_of,
)
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.pruning.selection.test_knapsack import chain, scores_of
from tests.support import tiny

VIT = {"name": "vit_tiny_patch16_224", "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 3}


def pretend_figure(candidate: Candidate) -> float:
    """A figure that prefers wide first groups: enough for evolution to have a direction."""
    return sum(count / (i + 1) for i, count in enumerate(candidate.counts))


def all_of(search: RatioSearch) -> list[Candidate]:
    made: list[Candidate] = []
    figures: dict[int, float] = {}
    while new := search.generation(made, figures):
        made += new
        figures |= {candidate.number: pretend_figure(candidate) for candidate in new}
    return made


def search_of(graph: DependencyGraph, request: SelectionRequest, *targets: float, candidates: int = 50) -> RatioSearch:
    return ratio_search(graph, scores_of(graph, 0), request, targets, candidates)


@pytest.mark.parametrize(
    ("network", "request_"),
    [
        (lambda: tiny.network(), SelectionRequest(target=("macs", 0.5))),
        (lambda: tiny.network(), SelectionRequest(target=("params", 0.4), round_to=4, max_ratio=0.75)),
        (lambda: tiny.network(), SelectionRequest(target=("memory", 0.8), min_channels=3)),
        (lambda: tiny.network(), SelectionRequest(target=("macs", 0.6), keep_ratios={"layer1*": 0.75})),
        (lambda: tiny.network(**VIT), SelectionRequest(target=("macs", 0.7))),
    ],
)
def test_every_candidate_is_legal_and_within_its_target(network, request_):
    graph = trace_groups(network(), tiny.example()[:1])
    search = search_of(graph, request_, 0.9, candidates=40)
    made = all_of(search)
    assert [candidate.number for candidate in made] == list(range(40))
    assert {candidate.target for candidate in made} == {request_.target[1], 0.9}
    for candidate in made:
        assert search.share(candidate.counts) <= candidate.target
        for group, count in zip(graph.free, candidate.counts, strict=True):
            assert count in steps_of(group, request_), (group.name, candidate.origin)
    assert {"uniform", "global", "isomorphic", "knapsack", "drawn"} < {candidate.origin for candidate in made}
    near = [search.share(c.counts) for c in made if c.target == request_.target[1] and c.origin == "drawn"]
    assert np.mean(near) > 0.95 * request_.target[1], "no candidate gives away what its target allows"


def test_the_first_candidate_is_the_uniform_plan():
    graph = chain()
    request = SelectionRequest(target=("macs", 0.5), scope="global")
    first = search_of(graph, request, candidates=1).generation([], {})
    kept = select_by_score(graph, scores_of(graph, 0), SelectionRequest(target=("macs", 0.5)))
    assert [(c.origin, c.counts) for c in first] == [("uniform", tuple(len(kept[g.name]) for g in graph.free))]


def test_a_candidate_is_decided_by_the_seed_and_its_number():
    graph = trace_groups(tiny.network(), tiny.example()[:1])
    request = SelectionRequest(target=("macs", 0.5))
    made = all_of(search_of(graph, request))
    assert made == all_of(search_of(graph, request))
    other = all_of(search_of(graph, SelectionRequest(target=("macs", 0.5), seed=1)))
    assert made[0] == other[0] and made != other
    drawn = [candidate.counts for candidate in made]
    assert len(set(drawn)) > 0.9 * len(drawn), "candidates differ"


def test_evolution_finds_more_than_draws():
    graph = trace_groups(tiny.network(), tiny.example()[:1])
    made = all_of(search_of(graph, SelectionRequest(target=("macs", 0.5)), candidates=100))
    evolved = [c for c in made if c.origin in ("varied", "crossed")]
    assert max(map(pretend_figure, evolved)) > max(pretend_figure(c) for c in made if c not in evolved)


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nothing_beats(seed):
    rng = np.random.default_rng(seed)
    points = {n: (float(rng.integers(5)), float(rng.integers(5))) for n in range(12)}
    front = front_of(points)
    for number, (cost, figure) in points.items():
        beaten = any(c <= cost and f >= figure and (c, f) != (cost, figure) for c, f in points.values())
        assert beaten or points[number] in [points[n] for n in front]
    assert all(
        not (points[a][0] <= points[b][0] and points[a][1] >= points[b][1]) for a in front for b in front if a != b
    )


def test_equal_figures_go_to_the_smaller_number():
    made = [Candidate(number, 0.5, (number,), "drawn") for number in range(3)]
    assert [c.number for c in best_of(made, {0: 1.0, 1: 2.0, 2: 2.0})] == [1, 2, 0]


def test_the_work_is_counted():
    assert forward_passes(10, 205, 30, 50) == (10 * (5 + 1), 2350)

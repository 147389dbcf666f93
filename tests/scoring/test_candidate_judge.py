"""Judging on real ranks: one winner whatever their number, resumed after a stop, never worse than the uniform plan."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_prune.data.held_pixels import HeldPixels
from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.first_candidates import ratio_search
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.pruning.selection.ratio_search import Counts, RatioSearch, best_of
from dist_prune.scoring.candidate_judge import CandidateJudge
from dist_prune.tasks.classification import CLASSIFICATION
from dist_prune.training.evaluation import evaluate
from dist_prune.training.tracking import Tracker
from tests.support import tiny

JUDGED, REPAIRED, CANDIDATES = np.arange(60), np.arange(60, 85), 23


def parts(comm: Communicator, file: Path | None = None) -> tuple[RatioSearch, CandidateJudge]:
    bench = tiny.bench(tiny.network())
    method = tiny.method("l1")
    scores, request = method.score(bench), SelectionRequest(target=("macs", 0.5))
    orders = method.orders(scores, bench.graph, request)

    def plan_of(counts: Counts) -> Plan:
        kept = {g.name: orders[g.name][g.width - n :] for g, n in zip(bench.graph.free, counts, strict=True)}
        return Plan.from_kept(bench.graph, kept)

    search = ratio_search(bench.graph, method.importance(scores, bench.graph), request, (0.7,), CANDIDATES)
    judge = CandidateJudge(
        bench.model, bench.graph, plan_of, tiny.digits_feed(), JUDGED, REPAIRED, 20, comm, Tracker(False),
        CLASSIFICATION, file, "test",
    )  # fmt: skip
    return search, judge


def searched(comm: Communicator, file: Path | None = None) -> tuple[list[Any], dict[int, float], str]:
    torch.set_num_threads(1)
    search, judge = parts(comm, file)
    made, judged = judge.search(search)
    figures = {number: judgement.figure for number, judgement in judged.items()}
    winner = best_of([c for c in made if c.target == 0.5], figures)[0]
    return [(c.number, c.origin, c.counts) for c in made], figures, judge.plan_of(winner.counts).fingerprint


@pytest.fixture(scope="module")
def alone() -> tuple[list[Any], dict[int, float], str]:
    return searched(Communicator())


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_finds_the_same_winner(pool, world, alone):
    for found in pool.run(world, searched):
        assert found == alone


def test_the_winner_is_not_worse_than_the_uniform_plan(alone):
    made, figures, _ = alone
    own = [number for number, _, _ in made if number % 2 == 0]
    assert made[0][1] == "uniform" and max(figures[number] for number in own) >= figures[0]
    assert len(set(figures.values())) > 5, "the figures tell candidates apart"


def test_a_figure_is_that_of_the_cut_and_recalibrated_network(alone):
    """By another way: cut, batch norms in training mode with a cumulative average, evaluated."""
    _, judge = parts(Communicator())
    small = tiny.cut(judge.model, judge.graph, judge.plan_of(alone[0][3][2]))
    loader, norms = tiny.digits_feed(), [m for m in small.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():  # equal micro-batches, so the cumulative average is their mean
        for start in range(0, 20, 20):
            small(next(loader.batches([REPAIRED[start : start + 20]])).images)
    judge.repaired = REPAIRED[:20]
    (found,) = judge.judge([alone[0][3][2]], 0, 1)
    figures = evaluate(small, loader, 20, Communicator(), Tracker(False), ids=JUDGED)
    assert found.figure == figures["top1"]


def test_a_stopped_search_resumes_with_what_it_has_judged(tmp_path, monkeypatch, alone):
    file = tmp_path / "judged.jsonl"
    search, judge = parts(Communicator(), file)
    judge_once, ran = CandidateJudge._run, []
    monkeypatch.setattr(CandidateJudge, "_run", stopping(judge_once, ran))
    with pytest.raises(preemption.PreemptedError, match="the search"):
        judge.search(search)
    monkeypatch.undo()
    before = file.read_text().splitlines()
    assert 0 < len(before) < CANDIDATES
    with file.open("a") as stream:
        stream.write('{"of": "test", "job": [1')  # a kill in the middle of a line
    ran = []
    _, judge = parts(Communicator(), file)
    monkeypatch.setattr(CandidateJudge, "_run", counted(CandidateJudge._run, ran))
    again = judge.search(search)
    figures = {number: judgement.figure for number, judgement in again[1].items()}
    assert figures == alone[1]
    different = {counts for _, _, counts in alone[0]}
    done = {tuple(json.loads(line)["job"]) for line in before}
    assert {tuple(counts) for counts in ran} == different - done, "nothing is judged twice"


def stopping(run: Any, ran: list[Any]) -> Any:
    """After five networks the process is asked to stop, in the middle of a job."""

    def wrapped(self: CandidateJudge, counts: list[int]) -> Any:
        ran.append(counts)
        if len(ran) > 5:
            raise preemption.preempted_error("in the search")
        return run(self, counts)

    return wrapped


def counted(run: Any, ran: list[Any]) -> Any:
    def wrapped(self: CandidateJudge, counts: list[int]) -> Any:
        ran.append(counts)
        return run(self, counts)

    return wrapped


def test_an_image_never_judges_and_repairs():
    _, judge = parts(Communicator())
    with pytest.raises(PruneError, match="judge candidates as well"):
        CandidateJudge(
            judge.model, judge.graph, judge.plan_of, judge.loader, JUDGED, JUDGED[-1:], 20, judge.comm, judge.tracker,
            CLASSIFICATION,
        )  # fmt: skip


def test_pixels_of_files_are_read_once():
    loader, read = tiny.digits_feed(), []
    inner = loader._image_backend

    class Counting:
        name, allowed, policies, skips = "torch", inner.allowed, inner.policies, False

        def pixels(self, id_lists: Any, transform: Any, augment: Any, size: int):
            read.extend(id_lists)
            return inner.pixels(id_lists, transform, augment, size)

        def close(self) -> None:
            pass

    loader._image_backend = Counting()
    held = loader.holding()
    assert isinstance(held._image_backend, HeldPixels)
    lists = [np.arange(5), np.arange(5, 9)]
    first, second = ([batch.images for batch in held.batches(lists)] for _ in range(2))
    assert len(read) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[0], next(tiny.digits_feed().batches(lists[:1])).images)

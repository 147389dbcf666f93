"""Judging of pruned networks on the ranks of a run: each rank cuts, repairs and evaluates whole networks alone."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_prune.data.loader import ImageLoader
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.parallel_map import map_cached
from dist_prune.distributed.result_cache import ResultCache
from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.capture import reproducible_kernels
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.ratio_search import Candidate, Counts, RatioSearch, best_of
from dist_prune.pruning.surgery.surgeon import apply_plan
from dist_prune.tasks.base import Task
from dist_prune.training.bn_recalibration import recalibrate_bn
from dist_prune.training.evaluation import evaluate
from dist_prune.training.tracking import Tracker

ROUND_S = 20.0  # seconds between two exchanges of results: a network that took less costs no waiting rank


@dataclass(frozen=True)
class Judgement:
    """What one network is worth.

    Attributes:
        figure: the task's primary figure on the judging images; nan if an output is not finite.
        seconds: that its cut, its repair and its evaluation took.
    """

    figure: float
    seconds: float


@dataclass
class CandidateJudge:
    """Judges pruned networks by the task's primary figure on fixed images.

    A network is judged once, whatever the number of candidates that are equal to it, and by one rank alone: the figure
    does not depend on the number of ranks. Results are in ``file`` after each round; a stopped search reads them.

    Attributes:
        model: the network that is cut; not changed.
        graph: its dependency graph.
        plan_of: kept channels of each free group -> the plan that keeps them.
        loader: training images, without augmentation.
        judged: (n,) ids of the images that judge, ascending.
        repaired: (m,) ids of the images that batch norms are recalibrated on, ascending; empty: no repair.
        micro_batch: images of one forward pass.
        comm: all ranks.
        tracker: progress.
        task: its primary figure judges.
        file: JSON lines of the results, or None.
        identity: fingerprint of everything that decides a result beside the counts.
    """

    model: nn.Module
    graph: DependencyGraph
    plan_of: Callable[[Counts], Plan]
    loader: ImageLoader
    judged: np.ndarray
    repaired: np.ndarray
    micro_batch: int
    comm: Communicator
    tracker: Tracker
    task: Task
    file: Path | None = None
    identity: str = ""
    _cache: ResultCache = field(init=False, repr=False)

    def __post_init__(self):
        if np.intersect1d(self.judged, self.repaired).size:
            raise PruneError("select.search: images of the repair judge candidates as well")
        self.loader = self.loader.holding()
        self.model = copy.deepcopy(self.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._cache = ResultCache(self.file, self.identity, self.comm)

    def search(self, search: RatioSearch) -> tuple[list[Candidate], dict[int, Judgement]]:
        """Make and judge one generation of a search after the other. Collective.

        Args:
            search: its candidates have counts in the order of ``graph.free``; the same on every rank.

        Returns:
            All candidates in order, and number -> judgement of each; the same on every rank.

        Raises:
            PreemptedError: the run was asked to stop; finished rounds are in ``file``.
        """
        made: list[Candidate] = []
        judged: dict[int, Judgement] = {}
        figures: dict[int, float] = {}
        while new := search.generation(made, figures):
            found = self.judge([candidate.counts for candidate in new], len(made), search.total)
            judged |= {candidate.number: judgement for candidate, judgement in zip(new, found, strict=True)}
            made += new
            figures = {number: self.rank(judgement) for number, judgement in judged.items()}
            best = best_of([c for c in made if c.target == search.targets[0]], figures)[0]
            self.tracker.info(
                f"  search: {len(made)} of {search.total} candidates, best "
                f"{self.task.text(judged[best.number].figure)} ({best.origin}), uniform "
                f"{self.task.text(judged[0].figure)}"
            )
        return made, judged

    def rank(self, judgement: Judgement) -> float:
        """A figure as a number of which the larger one is better."""
        if judgement.figure != judgement.figure:
            return float("-inf")
        return judgement.figure if self.task.higher_is_better else -judgement.figure

    def judge(self, networks: Sequence[Counts], done: int, total: int) -> list[Judgement]:
        """Judge networks. Collective.

        Args:
            networks: kept channels of each free group, in the order of ``graph.free``; the same on every rank.
            done: number of candidates that were judged before, for progress.
            total: number of candidates that are judged in all.

        Returns:
            A judgement for each of them, the same on every rank.

        Raises:
            PreemptedError: the run was asked to stop; finished rounds are in ``file``.
        """
        jobs = sorted({tuple(counts) for counts in networks}, reverse=True)  # neighbours cost about the same
        listed = [list(job) for job in jobs]
        meter = self.tracker.meter(total, "search", first=done)

        def progress(finished: int, ran: int) -> None:
            meter.update(done + finished, ran)

        results = map_cached(listed, self._run, self.comm, self._cache, "the search", ROUND_S, progress)
        meter.close()
        by_job = {
            job: Judgement(float("nan") if found["figure"] is None else found["figure"], found["seconds"])
            for job, found in zip(jobs, results, strict=True)
        }
        return [by_job[tuple(counts)] for counts in networks]

    def _run(self, counts: list[int]) -> dict[str, Any]:
        """Cut, repair and evaluate one network on this rank alone."""
        start, alone = time.perf_counter(), Communicator(device=self.comm.device)
        small = copy.deepcopy(self.model)
        apply_plan(small, self.graph, self.plan_of(tuple(counts)))
        small.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with reproducible_kernels():
            if len(self.repaired):
                recalibrate_bn(small, self.loader, self.repaired, self.micro_batch, alone)
            figures = evaluate(
                small, self.loader, self.micro_batch, alone, Tracker(False), "the search", self.judged, self.task
            )
        figure = figures[self.task.primary]
        return {"figure": figure if figure == figure else None, "seconds": round(time.perf_counter() - start, 3)}

"""Orders of many groups: what is dealt over ranks, and what a stopped run finds again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dist_prune.pruning.elimination import Course, Elimination, Panel, once
from dist_prune.pruning.subjects import Subject

PARTS = 8  # into how many the channels are dealt: more than there are useful ranks per batch
STATIC = {"relevance": "relevance", "entropy": "alone"}  # criteria that need one pass


@dataclass(frozen=True)
class Ranked:
    """A group's order and (K,) float64 entropies of its channels in bits, mean over taps and batches."""

    course: Course
    alone: Tensor


@dataclass
class Ranking:
    """Ranks subjects; the same on every rank.

    Attributes:
        share: bench.share: independent jobs over ranks, saved.
        keep: bench.keep: the state of an elimination.
        rule: the rule of deletion of a subject.
        parallel: ``layers`` deals whole groups over ranks; ``batches`` and ``candidates`` deal the work of every step.
    """

    share: Callable[..., list[Any]]
    keep: Callable[..., dict[str, Tensor]]
    rule: Callable[[Subject], Elimination]
    parallel: Literal["layers", "batches", "candidates"] = "layers"

    def orders(self, subjects: Sequence[Subject], dead: Sequence[Sequence[int]]) -> list[Ranked]:
        """One order per subject; the channels of ``dead`` go first."""
        sigmas = widths_of(subjects, self.share)
        starts = [
            Course(s.width, [*gone], [0.0] * len(gone), [0.0] * len(gone))
            for s, gone in zip(subjects, dead, strict=True)
        ]
        if self.parallel == "layers":
            return self._by_layers(subjects, sigmas, starts)
        return [self._inside(*each) for each in zip(subjects, sigmas, starts, strict=True)]

    def _by_layers(
        self, subjects: Sequence[Subject], sigmas: Sequence[list[Tensor]], courses: list[Course]
    ) -> list[Ranked]:
        panels: dict[int, Panel] = {}
        costs, numbers = [subject.cost for subject in subjects], range(len(subjects))

        def panel(number: int) -> Panel:
            return panels.setdefault(number, subjects[number].panel(sigmas[number]))

        def entropies(job: tuple[str, str, int]) -> Tensor:
            return panel(job[2]).total("alone", range(subjects[job[2]].width))

        alone = self.share([("alone", subjects[i].name, i) for i in numbers], entropies, costs=costs)
        leg = 0
        while not all(course.done for course in courses):

            def further(job: tuple[str, str, int, int], before: list[Course] = courses) -> Tensor:
                number, course = job[2], before[job[2]]
                if not course.done:
                    course = self._further(subjects[number], panel(number), alone[number].sum(0), course)
                if course.done:
                    panels.pop(number, None)  # its kernels are no longer needed
                return course.tensor()

            tables = self.share([("leg", subjects[i].name, i, leg) for i in numbers], further, costs=costs)
            courses = [Course.of(subjects[i].width, tables[i]) for i in numbers]
            leg += 1
        return [Ranked(courses[i], _mean(subjects[i], alone[i])) for i in numbers]

    def _inside(self, subject: Subject, sigmas: list[Tensor], course: Course) -> Ranked:
        """One subject, the work of every step dealt over ranks."""
        panel = subject.panel(sigmas, self.share, 1 if self.parallel == "batches" else PARTS)
        alone = panel.total("alone", range(subject.width))
        saved = self.keep(subject.name)
        if saved:
            course = Course.of(subject.width, saved["course"])
        while not course.done:
            course = self._further(subject, panel, alone.sum(0), course)
            self.keep(subject.name, {"course": course.tensor()})
        return Ranked(course, _mean(subject, alone))

    def _further(self, subject: Subject, panel: Panel, alone: Tensor, course: Course) -> Course:
        criterion, rule = subject.estimator.criterion, self.rule(subject)
        if criterion not in STATIC:
            return rule.go_on(panel, alone, course)
        whole = once(panel, STATIC[criterion], alone, rule.combine, rule.rev)
        first = set(course.order)
        rest = [i for i, k in enumerate(whole.order) if k not in first]
        order = course.order + [whole.order[i] for i in rest]
        return Course(subject.width, order, course.scores + [whole.scores[i] for i in rest], whole.joints)


def widths_of(subjects: Sequence[Subject], share: Callable[..., list[Any]]) -> list[list[Tensor]]:
    """[subject][tap] -> (K,) kernel widths; batches are dealt over ranks."""
    jobs = []
    for number, subject in enumerate(subjects):
        alike = subject.estimator.binning or subject.estimator.width == "entropy_target"
        batches = range(1 if alike else len(subject.batches))
        jobs += [("widths", subject.name, number, tap, batch) for tap in range(len(subject.taps)) for batch in batches]

    def run(job: tuple[str, str, int, int, int]) -> Tensor:
        subject = subjects[job[2]]
        if subject.estimator.binning:
            return torch.ones(subject.width, dtype=torch.float64)
        return subject.sigmas(job[3], job[4])

    found = share(jobs, run)
    out: list[list[list[Tensor]]] = [[[] for _ in subject.taps] for subject in subjects]
    for (_, _, number, tap, _), sigma in zip(jobs, found, strict=True):
        out[number][tap].append(sigma)
    return [[s.combined(rows) for rows in taps] for s, taps in zip(subjects, out, strict=True)]


def _mean(subject: Subject, alone: Tensor) -> Tensor:
    panel = subject.panel([torch.ones(subject.width)] * len(subject.taps))
    batches = panel.batches if panel.counted is None else len(panel.counted)
    return alone.double().mean(0) / batches / panel.unit

"""What each channel group alone can lose: accuracy and loss at several keep ratios of one group, nothing finetuned."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dist_prune.config.recipe import Recipe
from dist_prune.errors import PruneError
from dist_prune.fileio import canonical, digest, file_digest
from dist_prune.methods.method import Method
from dist_prune.pruning.channels import Channels
from dist_prune.pruning.choose import Request
from dist_prune.pruning.cost import macs
from dist_prune.pruning.game import Batches, Games
from dist_prune.runtime.data.dealing import calibration, micro_batches
from dist_prune.runtime.data.feed import Feed
from dist_prune.runtime.evaluation import losses, mean_loss, num_correct
from dist_prune.runtime.jobs import recorded
from dist_prune.runtime.record import Record
from dist_prune.stages.calibrating import SCORES, starting
from dist_prune.stages.context import RunContext
from dist_prune.stages.order import DENSE, round_path

RECORD = "ratio_curves.jsonl"
HEAD = ("group", "width", "keep_ratio", "kept", "macs", "top1", "loss")
MEMORY = 2**30  # bytes of images, and as many of what the network makes of them before the group, that a rank keeps
Split = Literal["held_out", "test"]


@dataclass(frozen=True)
class Asked:
    """``ratios`` to keep of each group; ``images`` of a split, drawn by the recipe's seed (None: all)."""

    ratios: tuple[float, ...] = (0.9, 0.7, 0.5, 0.3, 0.1)
    images: int | None = 1000
    split: Split = "held_out"


@dataclass(frozen=True)
class Point:
    """One group cut to ``kept`` channels, the others whole: top-1 in percent, mean cross-entropy, share of the MACs."""

    ratio: float
    kept: int
    macs: float
    top1: float
    loss: float


@dataclass(frozen=True)
class Line:
    """A group's points, by falling ratio."""

    group: str
    width: int
    points: tuple[Point, ...]

    def drop(self, dense: Point) -> float:
        """Points of top-1 that it loses, the mean over its ratios."""
        return sum(dense.top1 - point.top1 for point in self.points) / len(self.points)

    def rise(self, dense: Point) -> float:
        """What the loss gains, the mean over its ratios; nan where one is not finite."""
        return sum(point.loss - dense.loss for point in self.points) / len(self.points)


@dataclass(frozen=True)
class Found:
    """The most sensitive group first."""

    dense: Point
    lines: tuple[Line, ...]
    images: int
    where: str
    split: Split = "held_out"
    whole: str | None = None  # recipe keys by which groups that select.keep_ratios does not name stay whole; None: none

    @cached_property
    def ordered(self) -> tuple[Line, ...]:
        """Lines by falling mean drop of top-1; of equals, the larger rise of the loss comes first."""

        def key(line: Line) -> tuple[float, float]:
            rise = line.rise(self.dense)
            return -line.drop(self.dense), -rise if rise == rise else -float("inf")

        return tuple(sorted(self.lines, key=key))

    def suggestion(self, most: float) -> dict[str, float]:
        """Group -> the smallest of the ratios down to which it loses at most ``most`` points; those that lose more at
        every ratio are left out."""
        out = {}
        for line in self.ordered:
            fits = None
            for point in line.points:
                if self.dense.top1 - point.top1 > most:
                    break
                fits = point.ratio
            if fits is not None:
                out[line.group] = fits
        return out

    def csv(self) -> str:
        """The CSV file: the dense network, then the groups, most sensitive first."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEAD)
        writer.writerow(["(dense)", "", 1.0, "", *_cells(self.dense)[2:]])
        for line in self.ordered:
            writer.writerows([line.group, line.width, *_cells(point)] for point in line.points)
        return file.getvalue()


def _cells(point: Point) -> list[Any]:
    return [point.ratio, point.kept, f"{point.macs:.6f}", f"{point.top1:.4f}", f"{point.loss:.6f}"]


def check(recipe: Recipe, method: Method) -> None:
    """PruneError where a recipe ranks no channels: a plan is replayed, or blocks of weights are masked."""
    if recipe.select.plan:
        raise PruneError("ratio-curves: select.plan replays a plan, so no criterion ranks channels; leave it out")
    if not getattr(method, "structured", True):
        raise PruneError(
            "ratio-curves: with method.p this method masks blocks of weights and ranks no channels; write method.p= "
            "and a select.keep_ratio"
        )


def measured(context: RunContext, asked: Asked) -> Found:
    """Every free group at every ratio, jobs dealt over ranks; what is on record is not done again.

    ``check`` says before any work whether the recipe ranks channels at all.
    """
    ranks, channels = context.environment.ranks, context.selection_graph()
    scores = context.read_tensors(round_path(context.round, SCORES))
    with torch.no_grad():
        cuts = {
            (group.name, ratio): removed(context.method, scores, channels, group.name, ratio, context.selection)
            for group in channels.free
            for ratio in sorted(asked.ratios, reverse=True)
        }
    feed, ids, where = part(context, asked)
    model = starting(context).to(context.environment.device)
    games = Games(model, channels, held(feed, micro_batches(ids, context.recipe.evaluate.batch)))
    dense_job = (channels.free[0].name, ())
    jobs = {_job(*cut): cut for cut in dict.fromkeys([dense_job, *((name, gone) for (name, _), gone in cuts.items())])}

    def run(job: tuple[str, str]) -> list[int]:
        name, gone = jobs[job]
        off = torch.zeros((1, channels.group(name).width), dtype=torch.bool)
        off[0, list(gone)] = True
        return games.of(name, "consumed", MEMORY).tally(off, judged)[0].tolist()

    identity = ranks.from_first(ranks.together(lambda: _identity(context, feed, ids))) or ""
    record = Record(context.run_dir / RECORD, identity, ranks)
    results = recorded(list(jobs), run, ranks, record, context.tracker.say, "ratio curves")
    of = dict(zip(jobs, results, strict=True))
    dense = macs(channels)

    def point(name: str, ratio: float, gone: tuple[int, ...]) -> Point:
        correct, units, images, strange = of[_job(name, gone) if gone else _job(*dense_job)]
        kept = channels.group(name).width - len(gone)
        share = macs(channels, {name: kept}) / dense
        return Point(ratio, kept, share, 100 * correct / images, mean_loss(units, strange, images))

    lines = []
    for group in channels.free:
        own = [(ratio, gone) for (name, ratio), gone in cuts.items() if name == group.name]
        lines.append(Line(group.name, group.width, tuple(point(group.name, *cut) for cut in own)))
    whole = _whole(context.method, channels, context.selection, asked.ratios[0])
    return Found(point(dense_job[0], 1.0, ()), tuple(lines), of[_job(*dense_job)][2], where, asked.split, whole)


def ranking(request: Request, ratios: Mapping[str, float]) -> Request:
    """The request's floors and rounding, with these groups at their ratio and the others whole."""
    return replace(request, threshold=None, target=None, counts=None, keep_ratio=1.0, keep_ratios=dict(ratios))


def _whole(method: Method, channels: Channels, request: Request, ratio: float) -> str | None:
    """The words that ask for what was measured beside ``select.keep_ratios``; None of a method without ratios."""
    try:
        method.check(channels, ranking(request, {channels.free[0].name: ratio}))
    except PruneError:
        return None
    others = {"threshold": request.threshold, "counts": request.counts}
    words = [f"select.{key}=" for key, value in others.items() if value is not None]
    return " ".join(["select.keep_ratio=1", *words, *([f"target.{request.target[0]}="] if request.target else [])])


def removed(
    method: Method, scores: Mapping[str, Tensor], channels: Channels, name: str, ratio: float, request: Request
) -> tuple[int, ...]:
    """The channels of one group that go where it alone keeps this share of them, within the request's floors and steps.

    A method that ranks is asked by ``select.keep_ratios``; one whose counts fall out of a threshold (graph) by a target
    for this group's channels: it may keep fewer than asked for.
    """
    alone = ranking(request, {name: ratio})
    width = channels.group(name).width
    share = max(1, round(width * ratio)) / width
    try:
        method.check(channels, alone)
        return method.select(scores, channels, alone).removed.get(name, ())
    except PruneError:
        only = channels.only([name])
        asked = replace(alone, keep_ratio=None, keep_ratios={}, target=("channels", share))
        return method.select(scores, only, asked).removed.get(name, ())


def judged(logits: Tensor, labels: Tensor) -> Tensor:
    """(m, n, classes) -> (m, 4): images that are right, loss in integer units, images, losses that are not finite."""
    parts = [torch.stack(losses(row.float(), labels)) for row in logits]
    loss = torch.stack(parts)
    count = torch.full_like(loss[:, 0], len(labels))
    return torch.stack([num_correct(logits, labels), loss[:, 0], count, loss[:, 1]], 1)


def part(context: RunContext, asked: Asked) -> tuple[Feed, np.ndarray, str]:
    """The images that judge: feed, ids (ascending), and in words what they are and what that is worth."""
    if asked.split == "test":
        feed, pool, where = context.images.loader(False), np.arange(len(context.images.loader(False))), "test images"
        where += ", which then chose: figures of a network that is cut by these curves are too good on them"
    else:
        feed = context.images.loader(True)
        pool, seen = context.images.holdout()
        where = "training images that train.holdout holds out"
        if context.networks.checkpoint is not None:
            where += (
                "; backbone.checkpoint may have been trained on them (then they are easy, and --split test says more)"
            )
        if "train" in seen:
            where += "; the dense network was trained on them (train.selection is not holdout)"
    chosen = "all" if asked.images is None else asked.images
    feed, ids = context.images.readable(feed, pool[calibration(feed.source.labels[pool], chosen, context.recipe.seed)])
    if not len(ids):
        raise PruneError(f"ratio-curves: none of the {where} can be read")
    return feed, ids, where


def held(feed: Feed, lists: Sequence[np.ndarray]) -> Batches:
    """The images in micro-batches, from any of them on; as many as the memory allows are read once."""
    kept: list[tuple[Tensor, Tensor]] = []
    size = 0

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal size
        yield from kept[start:]
        first = max(start, len(kept))
        for number, found in enumerate(feed.batches(lists[first:]) if first < len(lists) else (), first):
            size += found.images.numel() * found.images.element_size() * (number == len(kept))
            if number == len(kept) and size <= MEMORY:
                kept.append((found.images, found.labels))
            yield found.images, found.labels

    return batches


def _job(name: str, gone: tuple[int, ...]) -> tuple[str, str]:
    return name, digest(canonical(list(gone)))[:32] if gone else "whole"


def _identity(context: RunContext, feed: Feed, ids: np.ndarray) -> str:
    """What a measurement on record belongs to, beside the channels that are gone."""
    recipe = context.recipe
    weights = round_path(context.round, SCORES) if context.method.trains_weights else DENSE
    return digest(canonical({
        "weights": file_digest(context.path(weights)), "network": [recipe.backbone.name, recipe.backbone.kwargs],
        "images": feed.source.identity, "backend": feed.backend, "look": context.images.description()["eval_transform"],
        "ids": digest(ids.astype("<i8").tobytes()), "batch": recipe.evaluate.batch,
    }))  # fmt: skip

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
from dist_prune.data.loader import ImageLoader
from dist_prune.data.sampling import calibration_ids, micro_batches
from dist_prune.distributed.parallel_map import map_cached
from dist_prune.distributed.result_cache import ResultCache
from dist_prune.errors import PruneError
from dist_prune.fileio import canonical, digest, file_digest
from dist_prune.methods.base import Method
from dist_prune.pipeline.context import RunContext
from dist_prune.pipeline.stage_graph import DENSE, round_path
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.masked_accuracy import Batches, MaskedAccuracyCache
from dist_prune.pruning.selection.cost import macs
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.stages.calibration import SCORES, starting_network
from dist_prune.training.evaluation import losses, mean_loss, num_correct

RECORD = "ratio_curves.jsonl"
HEAD = ("group", "width", "keep_ratio", "kept", "macs", "top1", "loss")
MEMORY = 2**30  # bytes of images, and as many of what the network makes of them before the group, that a rank keeps
Split = Literal["held_out", "test"]


@dataclass(frozen=True)
class RatioRequest:
    """``ratios`` to keep of each group; ``images`` of a split, drawn by the recipe's seed (None: all)."""

    ratios: tuple[float, ...] = (0.9, 0.7, 0.5, 0.3, 0.1)
    images: int | None = 1000
    split: Split = "held_out"


@dataclass(frozen=True)
class RatioPoint:
    """One group cut to ``kept`` channels, the others whole: top-1 in percent, mean cross-entropy, share of the MACs."""

    ratio: float
    kept: int
    macs: float
    top1: float
    loss: float


@dataclass(frozen=True)
class RatioCurve:
    """A group's points, by falling ratio."""

    group: str
    width: int
    points: tuple[RatioPoint, ...]

    def drop(self, dense: RatioPoint) -> float:
        """Points of top-1 that it loses, the mean over its ratios."""
        return sum(dense.top1 - point.top1 for point in self.points) / len(self.points)

    def rise(self, dense: RatioPoint) -> float:
        """What the loss gains, the mean over its ratios; nan where one is not finite."""
        return sum(point.loss - dense.loss for point in self.points) / len(self.points)


@dataclass(frozen=True)
class RatioCurves:
    """The most sensitive group first."""

    dense: RatioPoint
    lines: tuple[RatioCurve, ...]
    images: int
    where: str
    split: Split = "held_out"
    whole: str | None = None  # recipe keys by which groups that select.keep_ratios does not name stay whole; None: none

    @cached_property
    def ordered(self) -> tuple[RatioCurve, ...]:
        """Lines by falling mean drop of top-1; of equals, the larger rise of the loss comes first."""

        def key(line: RatioCurve) -> tuple[float, float]:
            rise = line.rise(self.dense)
            return -line.drop(self.dense), -rise if rise == rise else -float("inf")

        return tuple(sorted(self.lines, key=key))

    def suggestion(self, max_drop: float) -> dict[str, float]:
        """Group -> the smallest of the ratios down to which it loses at most ``most`` points; those that lose more at
        every ratio are left out."""
        ratios = {}
        for line in self.ordered:
            ratio = None
            for point in line.points:
                if self.dense.top1 - point.top1 > max_drop:
                    break
                ratio = point.ratio
            if ratio is not None:
                ratios[line.group] = ratio
        return ratios

    def csv(self) -> str:
        """The CSV file: the dense network, then the groups, most sensitive first."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEAD)
        writer.writerow(["(dense)", "", 1.0, "", *_cells(self.dense)[2:]])
        for line in self.ordered:
            writer.writerows([line.group, line.width, *_cells(point)] for point in line.points)
        return file.getvalue()


def _cells(point: RatioPoint) -> list[Any]:
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


def measure(context: RunContext, request: RatioRequest) -> RatioCurves:
    """Every free group at every ratio, jobs dealt over ranks; what is on record is not done again.

    ``check`` says before any work whether the recipe ranks channels at all.
    """
    comm, graph = context.environment.comm, context.selection_graph()
    scores = context.read_tensors(round_path(context.round, SCORES))
    with torch.no_grad():
        cuts = {
            (group.name, ratio): removed_channels(context.method, scores, graph, group.name, ratio, context.selection)
            for group in graph.free
            for ratio in sorted(request.ratios, reverse=True)
        }
    loader, ids, where = evaluation_images(context, request)
    model = starting_network(context).to(context.environment.device)
    accuracies = MaskedAccuracyCache(
        model, graph, cached_images(loader, micro_batches(ids, context.recipe.evaluate.batch))
    )
    dense_job = (graph.free[0].name, ())
    jobs = {
        _job(*cut): cut for cut in dict.fromkeys([dense_job, *((name, removed) for (name, _), removed in cuts.items())])
    }

    def run(job: tuple[str, str]) -> list[int]:
        name, removed = jobs[job]
        masked = torch.zeros((1, graph.group(name).width), dtype=torch.bool)
        masked[0, list(removed)] = True
        return accuracies.for_group(name, "consumed", MEMORY).tally(masked, count_metrics)[0].tolist()

    identity = comm.broadcast_object(comm.run_on_main(lambda: _identity(context, loader, ids))) or ""
    record = ResultCache(context.run_dir / RECORD, identity, comm)
    results = map_cached(list(jobs), run, comm, record, context.tracker.info, "ratio curves")
    counts = dict(zip(jobs, results, strict=True))
    dense = macs(graph)

    def point(name: str, ratio: float, removed: tuple[int, ...]) -> RatioPoint:
        correct, loss_units, images, not_finite = counts[_job(name, removed) if removed else _job(*dense_job)]
        kept = graph.group(name).width - len(removed)
        share = macs(graph, {name: kept}) / dense
        return RatioPoint(ratio, kept, share, 100 * correct / images, mean_loss(loss_units, not_finite, images))

    lines = []
    for group in graph.free:
        group_cuts = [(ratio, removed) for (name, ratio), removed in cuts.items() if name == group.name]
        lines.append(RatioCurve(group.name, group.width, tuple(point(group.name, *cut) for cut in group_cuts)))
    unlisted_keys = _whole(context.method, graph, context.selection, request.ratios[0])
    return RatioCurves(
        point(dense_job[0], 1.0, ()), tuple(lines), counts[_job(*dense_job)][2], where, request.split, unlisted_keys
    )


def ranking(request: SelectionRequest, ratios: Mapping[str, float]) -> SelectionRequest:
    """The request's floors and rounding, with these groups at their ratio and the others whole."""
    return replace(request, threshold=None, target=None, counts=None, keep_ratio=1.0, keep_ratios=dict(ratios))


def _whole(method: Method, graph: DependencyGraph, request: SelectionRequest, ratio: float) -> str | None:
    """The words that ask for what was measured beside ``select.keep_ratios``; None of a method without ratios."""
    try:
        method.check(graph, ranking(request, {graph.free[0].name: ratio}))
    except PruneError:
        return None
    selection_keys = {"threshold": request.threshold, "counts": request.counts}
    assignments = [f"select.{key}=" for key, value in selection_keys.items() if value is not None]
    return " ".join(
        ["select.keep_ratio=1", *assignments, *([f"target.{request.target[0]}="] if request.target else [])]
    )


def removed_channels(
    method: Method,
    scores: Mapping[str, Tensor],
    graph: DependencyGraph,
    name: str,
    ratio: float,
    request: SelectionRequest,
) -> tuple[int, ...]:
    """The channels of one group that go where it alone keeps this share of them, within the request's floors and steps.

    A method that ranks is asked by ``select.keep_ratios``; one whose counts fall out of a threshold (graph) by a target
    for this group's channels: it may keep fewer than asked for.
    """
    alone = ranking(request, {name: ratio})
    width = graph.group(name).width
    share = max(1, round(width * ratio)) / width
    try:
        method.check(graph, alone)
        return method.select(scores, graph, alone).removed.get(name, ())
    except PruneError:
        only_graph = graph.restrict_to([name])
        only_request = replace(alone, keep_ratio=None, keep_ratios={}, target=("channels", share))
        return method.select(scores, only_graph, only_request).removed.get(name, ())


def count_metrics(logits: Tensor, labels: Tensor) -> Tensor:
    """(m, n, classes) -> (m, 4): images that are right, loss in integer units, images, losses that are not finite."""
    loss_parts = [torch.stack(losses(row.float(), labels)) for row in logits]
    loss = torch.stack(loss_parts)
    count = torch.full_like(loss[:, 0], len(labels))
    return torch.stack([num_correct(logits, labels), loss[:, 0], count, loss[:, 1]], 1)


def evaluation_images(context: RunContext, request: RatioRequest) -> tuple[ImageLoader, np.ndarray, str]:
    """The images that judge: feed, ids (ascending), and in words what they are and what that is worth."""
    if request.split == "test":
        loader, pool, where = context.images.loader(False), np.arange(len(context.images.loader(False))), "test images"
        where += ", which then chose: figures of a network that is cut by these curves are too good on them"
    else:
        loader = context.images.loader(True)
        pool, learning = context.images.holdout()
        where = "training images that train.holdout holds out"
        if context.networks.checkpoint is not None:
            where += (
                "; backbone.checkpoint may have been trained on them (then they are easy, and --split test says more)"
            )
        if "train" in learning:
            where += "; the dense network was trained on them (train.selection is not holdout)"
    count = "all" if request.images is None else request.images
    loader, ids = context.images.readable(
        loader, pool[calibration_ids(loader.source.labels[pool], count, context.recipe.seed)]
    )
    if not len(ids):
        raise PruneError(f"ratio-curves: none of the {where} can be read")
    return loader, ids, where


def cached_images(loader: ImageLoader, lists: Sequence[np.ndarray]) -> Batches:
    """The images in micro-batches, from any of them on; as many as the memory allows are read once."""
    cached: list[tuple[Tensor, Tensor]] = []
    size = 0

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal size
        yield from cached[start:]
        first = max(start, len(cached))
        for number, batch in enumerate(loader.batches(lists[first:]) if first < len(lists) else (), first):
            size += batch.images.numel() * batch.images.element_size() * (number == len(cached))
            if number == len(cached) and size <= MEMORY:
                cached.append((batch.images, batch.labels))
            yield batch.images, batch.labels

    return batches


def _job(name: str, removed: tuple[int, ...]) -> tuple[str, str]:
    return name, digest(canonical(list(removed)))[:32] if removed else "whole"


def _identity(context: RunContext, loader: ImageLoader, ids: np.ndarray) -> str:
    """What a measurement on record belongs to, beside the channels that are gone."""
    recipe = context.recipe
    weights = round_path(context.round, SCORES) if context.method.trains_weights else DENSE
    return digest(
        canonical(
            {
                "weights": file_digest(context.path(weights)),
                "network": [recipe.backbone.name, recipe.backbone.kwargs],
                "images": loader.source.identity,
                "backend": loader.backend,
                "look": context.images.description()["eval_transform"],
                "ids": digest(ids.astype("<i8").tobytes()),
                "batch": recipe.evaluate.batch,
            }
        )
    )

"""Ratio curves: accuracy and loss at several keep ratios of one channel group at a time, nothing finetuned."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dist_prune import tasks
from dist_prune.analysis.repaired_cuts import repaired_top1
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
from dist_prune.tasks.tallies import count_losses, mean_loss, num_correct

RECORD = "ratio_curves.jsonl"
HEAD = ("group", "width", "keep_ratio", "kept", "macs", "top1", "loss")
MEMORY = 2**30  # bytes of images that a rank caches, and as many of activations before the group
Split = Literal["held_out", "test"]


@dataclass(frozen=True)
class RatioRequest:
    """Request for ratio curves.

    Attributes:
        ratios: Shares of a group's channels to keep, each in (0, 1).
        images: Number of images, drawn by the recipe's seed; None for all.
        split: The images: training images that are held out, or the test images.
    """

    ratios: tuple[float, ...] = (0.9, 0.7, 0.5, 0.3, 0.1)
    images: int | None = 1000
    split: Split = "held_out"


@dataclass(frozen=True)
class RatioPoint:
    """The network with one group cut and the others dense.

    Attributes:
        ratio: Requested share of the group's channels.
        kept: Channels of the group that are kept.
        macs: Share of the dense network's MACs.
        top1: Top-1 in percent.
        loss: Mean cross-entropy; nan if a logit is not finite.
        repaired: Top-1 in percent after the recipe's repair; None without one.
    """

    ratio: float
    kept: int
    macs: float
    top1: float
    loss: float
    repaired: float | None = None

    @property
    def best(self) -> float:
        """Top-1 as a run of the recipe would have it before any finetuning: repaired, if it repairs."""
        return self.top1 if self.repaired is None else self.repaired


@dataclass(frozen=True)
class RatioCurve:
    """The points of one group.

    Attributes:
        group: Name of the group.
        width: Its number of channels.
        points: Its points by falling ratio.
    """

    group: str
    width: int
    points: tuple[RatioPoint, ...]

    def drop(self, dense: RatioPoint) -> float:
        """Points of top-1 that the group loses against the dense network, as the mean over its ratios."""
        return sum(dense.top1 - point.top1 for point in self.points) / len(self.points)

    def rise(self, dense: RatioPoint) -> float:
        """Increase of the loss against the dense network, as the mean over its ratios; nan if one is not finite."""
        return sum(point.loss - dense.loss for point in self.points) / len(self.points)


@dataclass(frozen=True)
class RatioCurves:
    """The ratio curves of a network.

    Attributes:
        dense: The dense network.
        lines: A curve per group, in the order of the graph.
        images: Number of images that were measured.
        where: Description of the images.
        split: Their split.
        whole: Recipe keys that keep the groups dense that ``select.keep_ratios`` does not name; None if the method
            takes no keep ratios.
    """

    dense: RatioPoint
    lines: tuple[RatioCurve, ...]
    images: int
    where: str
    split: Split = "held_out"
    whole: str | None = None

    @property
    def repaired(self) -> bool:
        """Whether the cut networks were also repaired and measured again."""
        return any(point.repaired is not None for line in self.lines for point in line.points)

    @cached_property
    def ordered(self) -> tuple[RatioCurve, ...]:
        """Curves by falling mean drop of top-1, the most sensitive group first; ties by falling rise of the loss."""

        def key(line: RatioCurve) -> tuple[float, float]:
            rise = line.rise(self.dense)
            return -line.drop(self.dense), -rise if rise == rise else -float("inf")

        return tuple(sorted(self.lines, key=key))

    def suggestion(self, max_drop: float) -> dict[str, float]:
        """Suggest a keep ratio for each group.

        Args:
            max_drop: Points of top-1 that a group may lose.

        Returns:
            Group -> the smallest ratio down to which it loses at most ``max_drop``. Groups that lose more at every
            ratio are left out.
        """
        ratios = {}
        for line in self.ordered:
            ratio = None
            for point in line.points:
                if self.dense.top1 - point.best > max_drop:
                    break
                ratio = point.ratio
            if ratio is not None:
                ratios[line.group] = ratio
        return ratios

    def csv(self) -> str:
        """The CSV file's text: the dense network, then the groups, most sensitive first."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        more = ["repaired_top1"] if self.repaired else []
        writer.writerow([*HEAD, *more])
        writer.writerow(["(dense)", "", 1.0, "", *_cells(self.dense)[2:], *([""] * len(more))])
        for line in self.ordered:
            for point in line.points:
                after = [f"{point.best:.4f}"] if more else []
                writer.writerow([line.group, line.width, *_cells(point), *after])
        return file.getvalue()


def _cells(point: RatioPoint) -> list[Any]:
    return [point.ratio, point.kept, f"{point.macs:.6f}", f"{point.top1:.4f}", f"{point.loss:.6f}"]


def check(recipe: Recipe, method: Method) -> None:
    """Check that a recipe ranks channels.

    Args:
        recipe: The validated recipe.
        method: Its method.

    Raises:
        PruneError: The recipe replays a plan, its method masks blocks of weights, or its task has no top-1.
    """
    if not tasks.build(recipe.task).is_classification:
        raise PruneError(f"ratio-curves: curves are of top-1, and the task {recipe.task.get('name')} has none")
    if recipe.select.plan:
        raise PruneError("ratio-curves: select.plan replays a plan, so no criterion ranks channels; leave it out")
    if not getattr(method, "structured", True):
        raise PruneError(
            "ratio-curves: with method.p this method masks blocks of weights and ranks no channels; write method.p= "
            "and a select.keep_ratio"
        )


def measure(context: RunContext, request: RatioRequest) -> RatioCurves:
    """Measure every free group at every ratio. All ranks call it and share the jobs; recorded results are reused.

    Call ``check`` before any work.

    Args:
        context: The run; its current round is scored.
        request: Ratios and images.
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
        return accuracies.for_group(name, "consumed", MEMORY).evaluate(masked, count_metrics)[0].tolist()

    identity = comm.broadcast_object(comm.run_on_main(lambda: _identity(context, loader, ids))) or ""
    record = ResultCache(context.run_dir / RECORD, identity, comm)
    meter = context.tracker.meter(len(jobs), "ratio curves")
    results = map_cached(list(jobs), run, comm, record, "ratio curves", progress=meter.update)
    meter.close()
    counts = dict(zip(jobs, results, strict=True))
    repaired: dict[tuple[str, tuple[int, ...]], float] = {}
    if context.recipe.repair.method != "none":
        wanted = [(name, removed) for (name, _), removed in cuts.items() if removed]
        batches = cached_images(loader, micro_batches(ids, context.recipe.evaluate.batch))
        repaired = repaired_top1(context, graph, model, wanted, batches, ids, request.split, identity, count_metrics)
    dense = macs(graph)

    def point(name: str, ratio: float, removed: tuple[int, ...]) -> RatioPoint:
        correct, loss_units, images, not_finite = counts[_job(name, removed) if removed else _job(*dense_job)]
        kept = graph.group(name).width - len(removed)
        share = macs(graph, {name: kept}) / dense
        top1, loss = 100 * correct / images, mean_loss(loss_units, not_finite, images)
        return RatioPoint(ratio, kept, share, top1, loss, repaired.get((name, removed), top1 if repaired else None))

    lines = []
    for group in graph.free:
        group_cuts = [(ratio, removed) for (name, ratio), removed in cuts.items() if name == group.name]
        lines.append(RatioCurve(group.name, group.width, tuple(point(group.name, *cut) for cut in group_cuts)))
    unlisted_keys = _whole(context.method, graph, context.selection, request.ratios[0])
    return RatioCurves(
        point(dense_job[0], 1.0, ()), tuple(lines), counts[_job(*dense_job)][2], where, request.split, unlisted_keys
    )


def with_keep_ratios(request: SelectionRequest, ratios: Mapping[str, float]) -> SelectionRequest:
    """The request with its floors and rounding, some groups at a keep ratio and the others dense.

    Args:
        request: The recipe's selection.
        ratios: Group -> share of its channels to keep.
    """
    return replace(request, threshold=None, target=None, counts=None, keep_ratio=1.0, keep_ratios=dict(ratios))


def _whole(method: Method, graph: DependencyGraph, request: SelectionRequest, ratio: float) -> str | None:
    """The recipe keys that, beside ``select.keep_ratios``, select what was measured; None if the method takes none."""
    try:
        method.check(graph, with_keep_ratios(request, {graph.free[0].name: ratio}))
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
    """The channels that are removed from one group if it alone is pruned.

    A method that ranks channels gets ``select.keep_ratios``. A method whose counts result from a threshold (graph) gets
    a target for this group's channels, and may keep fewer.

    Args:
        method: The recipe's method.
        scores: Its scores.
        graph: The dependency graph.
        name: The group.
        ratio: Share of its channels to keep.
        request: The recipe's selection, whose floors and rounding apply.
    """
    alone = with_keep_ratios(request, {name: ratio})
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
    """Integer counts that add up to accuracy and loss.

    Args:
        logits: (m, n, classes) of m masked networks on n images.
        labels: (n,) int64.

    Returns:
        (m, 4) int64: correct images, loss in integer units (see ``count_losses``), images, images with a
        loss that is not finite.
    """
    loss_parts = [
        count_losses(functional.cross_entropy(row.float().double(), labels, reduction="none")) for row in logits
    ]
    loss = torch.stack(loss_parts)
    count = torch.full_like(loss[:, 0], len(labels))
    return torch.stack([num_correct(logits, labels), loss[:, 0], count, loss[:, 1]], 1)


def evaluation_images(context: RunContext, request: RatioRequest) -> tuple[ImageLoader, np.ndarray, str]:
    """The images to measure on.

    Args:
        context: The run.
        request: Number and split of the images.

    Returns:
        Their loader, their ids (ascending, (n,) int64), and a description with its caveats.

    Raises:
        PruneError: None of the images can be read.
    """
    if request.split == "test":
        loader = context.images.loader(False)
        pool = np.arange(len(loader))
        where = "test images, which then chose: the figures of a network cut by these curves on them are too good"
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
    """Read images in micro-batches, and keep as many as ``MEMORY`` allows for the next pass.

    Args:
        loader: The loader of the images.
        lists: The ids of each micro-batch.

    Returns:
        A function from the number of a micro-batch to (images, labels) of it and all that follow.
    """
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
    """Digest of everything that decides a recorded measurement, beside the removed channels."""
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

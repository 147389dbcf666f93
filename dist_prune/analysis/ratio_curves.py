"""Ratio curves: figure and loss at several keep ratios of one channel group at a time, nothing finetuned."""

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dist_prune.analysis.cut_judges import Judged, judge_of
from dist_prune.analysis.cut_times import CutTimes
from dist_prune.analysis.repaired_cuts import repaired_results
from dist_prune.config.recipe import Recipe
from dist_prune.data.loader import ImageLoader
from dist_prune.data.sampling import calibration_ids
from dist_prune.distributed.parallel_map import map_cached
from dist_prune.distributed.result_cache import ResultCache
from dist_prune.errors import PruneError
from dist_prune.fileio import canonical, digest, file_digest
from dist_prune.methods.base import Method
from dist_prune.pipeline.context import RunContext
from dist_prune.pipeline.stage_graph import DENSE, round_path
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.selection.cost import macs
from dist_prune.pruning.selection.ranking import SelectionRequest
from dist_prune.stages.calibration import SCORES, starting_network
from dist_prune.tasks.classification import CLASSIFICATION
from dist_prune.tasks.primary import PrimaryFigure

RECORD = "ratio_curves.jsonl"
HEAD = ("group", "width", "keep_ratio", "kept", "macs")
TIMES = ("ms", "dense_ms", "speedup", "reliable")
TOP1 = PrimaryFigure.of(CLASSIFICATION.description())
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
        figure: The primary figure of the task; nan if it has no value.
        loss: Mean loss; nan if an output is not finite.
        repaired: The figure after the recipe's repair; None without one.
    """

    ratio: float
    kept: int
    macs: float
    figure: float
    loss: float
    repaired: float | None = None

    @property
    def best(self) -> float:
        """The figure as a run of the recipe would have it before any finetuning: repaired, if it repairs."""
        return self.figure if self.repaired is None else self.repaired

    def facts(self, primary: PrimaryFigure) -> dict[str, Any]:
        """The point as JSON, its figure under the figure's own name."""
        return {(primary.key if key == "figure" else key): value for key, value in asdict(self).items()}


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

    def drop(self, dense: RatioPoint, primary: PrimaryFigure = TOP1) -> float:
        """How much worse the figure is than the dense network's, as the mean over the ratios; nan if one has none."""
        return sum(primary.lost(dense.figure, point.figure) for point in self.points) / len(self.points)

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
        primary: The figure that the task is judged by.
    """

    dense: RatioPoint
    lines: tuple[RatioCurve, ...]
    images: int
    where: str
    split: Split = "held_out"
    whole: str | None = None
    primary: PrimaryFigure = TOP1

    @property
    def repaired(self) -> bool:
        """Whether the cut networks were also repaired and measured again."""
        return any(point.repaired is not None for line in self.lines for point in line.points)

    @cached_property
    def ordered(self) -> tuple[RatioCurve, ...]:
        """Curves by falling mean loss of the figure, the most sensitive group first; ties by falling rise of the loss.

        What is not a number comes first.
        """

        def key(line: RatioCurve) -> tuple[float, ...]:
            values = (line.drop(self.dense, self.primary), line.rise(self.dense))
            return tuple(-value if value == value else -float("inf") for value in values)

        return tuple(sorted(self.lines, key=key))

    def suggestion(self, max_drop: float) -> dict[str, float]:
        """Suggest a keep ratio for each group.

        Args:
            max_drop: By how much a group may make the figure worse, in the figure's unit (points, where it is percent).

        Returns:
            Group -> the smallest ratio down to which it loses at most ``max_drop``. Groups that lose more at every
            ratio are left out.
        """
        ratios = {}
        for line in self.ordered:
            ratio = None
            for point in line.points:
                if not self.primary.lost(self.dense.figure, point.best) <= max_drop:  # or it is not a number
                    break
                ratio = point.ratio
            if ratio is not None:
                ratios[line.group] = ratio
        return ratios

    def csv(self, times: CutTimes | None = None) -> str:
        """The CSV file's text: the dense network, then the groups, most sensitive first.

        Args:
            times: Measured times of the points' networks; None: none.
        """
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        more = [f"repaired_{self.primary.key}"] if self.repaired else []
        more_times = TIMES if times is not None else ()
        writer.writerow([*HEAD, self.primary.key, "loss", *more, *more_times])
        blank = [""] * (len(more) + len(more_times))
        writer.writerow(["(dense)", "", 1.0, "", *self._cells(self.dense)[2:], *blank])
        for line in self.ordered:
            for point in line.points:
                after = [self._number(point.best)] if more else []
                row = [line.group, line.width, *self._cells(point), *after]
                found = times.facts(line.group, str(point.kept)) if times is not None else {}
                writer.writerow([*row, *(found[key] for key in more_times)])
        return file.getvalue()

    def _cells(self, point: RatioPoint) -> list[Any]:
        return [point.ratio, point.kept, f"{point.macs:.6f}", self._number(point.figure), f"{point.loss:.6f}"]

    def _number(self, value: float) -> str:
        return f"{value:.4f}" if self.primary.percent else f"{value:.6g}"


def check(recipe: Recipe, method: Method) -> None:
    """Check that a recipe ranks channels.

    Args:
        recipe: The validated recipe.
        method: Its method.

    Raises:
        PruneError: The recipe replays a plan, or its method masks blocks of weights.
    """
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
    judge = judge_of(context, model, graph, loader, ids)
    dense_job = (graph.free[0].name, ())
    jobs = {
        _job(*cut): cut for cut in dict.fromkeys([dense_job, *((name, removed) for (name, _), removed in cuts.items())])
    }

    def run(job: tuple[str, str]) -> list[Any]:
        return judge.cut(*jobs[job])

    identity = comm.broadcast_object(comm.run_on_main(lambda: _identity(context, loader, ids))) or ""
    record = ResultCache(context.run_dir / RECORD, identity, comm)
    meter = context.tracker.meter(len(jobs), "ratio curves")
    results = map_cached(list(jobs), run, comm, record, "ratio curves", progress=meter.update)
    meter.close()
    judged = {job: judge.read(result) for job, result in zip(jobs, results, strict=True)}
    repaired: dict[tuple[str, tuple[int, ...]], Judged] = {}
    if context.recipe.repair.method != "none":
        wanted = [(name, removed) for (name, _), removed in cuts.items() if removed]
        repaired = repaired_results(context, graph, model, wanted, judge, ids, request.split, identity)
    dense = macs(graph)

    def point(name: str, ratio: float, removed: tuple[int, ...]) -> RatioPoint:
        cut = judged[_job(name, removed) if removed else _job(*dense_job)]
        after = repaired.get((name, removed), cut).figure if repaired else None
        kept = graph.group(name).width - len(removed)
        return RatioPoint(ratio, kept, macs(graph, {name: kept}) / dense, cut.figure, cut.loss, after)

    lines = []
    for group in graph.free:
        group_cuts = [(ratio, removed) for (name, ratio), removed in cuts.items() if name == group.name]
        lines.append(RatioCurve(group.name, group.width, tuple(point(group.name, *cut) for cut in group_cuts)))
    unlisted_keys = _whole(context.method, graph, context.selection, request.ratios[0])
    return RatioCurves(
        point(dense_job[0], 1.0, ()),
        tuple(lines),
        judged[_job(*dense_job)].images,
        where,
        request.split,
        unlisted_keys,
        PrimaryFigure.of(context.task.description()),
    )


def with_keep_ratios(request: SelectionRequest, ratios: Mapping[str, float]) -> SelectionRequest:
    """The request with its floors and rounding, some groups at a keep ratio and the others dense; no block goes.

    Args:
        request: The recipe's selection.
        ratios: Group -> share of its channels to keep.
    """
    channels = replace(request, threshold=None, target=None, counts=None, depth=False)
    return replace(channels, keep_ratio=1.0, keep_ratios=dict(ratios))


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


def _job(name: str, removed: tuple[int, ...]) -> tuple[str, str]:
    return name, digest(canonical(list(removed)))[:32] if removed else "whole"


def _identity(context: RunContext, loader: ImageLoader, ids: np.ndarray) -> str:
    """Digest of everything that decides a recorded measurement, beside the removed channels."""
    recipe = context.recipe
    classifies = context.task.name == CLASSIFICATION.name
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
                **({} if classifies else {"task": context.task.description()}),
                **({"dense": file_digest(context.path(DENSE))} if context.task.compares else {}),
            }
        )
    )

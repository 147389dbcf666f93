"""Stage ``curves``, after ``evaluate``: figure and information plane for every number of kept filters of a group.

    dense.safetensors, round_1/scores.safetensors -> curves.csv

One group is cut at a time, by the order in which the method eliminates its filters; nothing is finetuned. Without
``information.curves`` the file has a header only.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.data.loader import Batch
from dist_prune.data.sampling import micro_batches
from dist_prune.errors import PruneError
from dist_prune.pipeline.context import RunContext, StageOutput
from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.hooks.activations import ActivationCensus, Activations, distinct, group_inputs
from dist_prune.pruning.hooks.consumers import ChannelPoint
from dist_prune.pruning.hooks.gating import gate, gate_points
from dist_prune.pruning.information.information_plane import COLUMNS, InformationPlane
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.stages.measuring import Measure
from dist_prune.tasks.classification import CLASSIFICATION
from dist_prune.tasks.primary import PrimaryFigure
from dist_prune.tasks.tallies import num_correct
from dist_prune.training.evaluation import count_images

SCORES = "round_1/scores.safetensors"
HEAD = ("group", "width", "kept", "deleted")


def run(context: RunContext) -> StageOutput:
    """Measure the curves that ``information.curves`` requests; facts: the numbers of groups and lines.

    Raises:
        PruneError: The method ranks no group that ``information.layers`` names.
    """
    spec = context.recipe.information
    if spec.curves == "none" or context.recipe.select.plan:
        return StageOutput({}, texts={"curves.csv": text([], context.task.primary)})
    orders = {name: order for name, order in _orders(context).items() if any(fnmatchcase(name, g) for g in spec.layers)}
    if not orders:
        raise PruneError(
            f"information.curves: the method {context.recipe.method['name']} ranks no group that information.layers "
            "names"
        )
    event = "curves.csv is measured on test images: a number of channels chosen by it is selected on them"
    context.tracker.info(f"  {event}")
    context.events.append({"stage": "curves", "event": event})
    model = context.networks.load_dense().to(context.environment.device)
    primary = PrimaryFigure.of(context.task.description())
    figures = accuracy(context, model, orders) if spec.curves != "information" else {}
    planes = information(context, model, orders) if spec.curves != "accuracy" else {}
    lines = []
    for name, order in orders.items():
        for kept in range(len(order), 0, -1):
            deleted = "" if kept == len(order) else order[len(order) - kept - 1]
            figure = _number(primary, figures[name][kept - 1]) if figures else ""
            plane = [f"{value:.6f}" for value in planes[name][kept - 1].tolist()] if planes else [""] * len(COLUMNS)
            lines.append([name, len(order), kept, deleted, figure, *plane])
    return StageOutput({"groups": len(orders), "lines": len(lines)}, texts={"curves.csv": text(lines, primary.key)})


def text(lines: Sequence[Sequence[object]], primary: str) -> str:
    """The CSV file's text.

    Args:
        lines: Rows of as many cells as there are columns: ``HEAD``, the figure, ``COLUMNS``.
        primary: Name of the task's primary figure.
    """
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([[*HEAD, primary, *COLUMNS], *lines])
    return file.getvalue()


def _number(primary: PrimaryFigure, value: float) -> str:
    return f"{value:.4f}" if primary.percent else f"{value:.6g}"


def _orders(context: RunContext) -> dict[str, list[int]]:
    graph = context.selection_graph()
    with torch.no_grad():
        orders = context.method.orders(context.read_tensors(SCORES), graph, context.selection)
    return {name: list(order) for name, order in orders.items()}


def _image_ids(context: RunContext) -> np.ndarray:
    count = len(context.images.loader(False))
    return np.arange(min(count, context.recipe.information.images or count))


def accuracy(context: RunContext, model: nn.Module, orders: Mapping[str, Sequence[int]]) -> dict[str, list[float]]:
    """The primary figure with every number of kept filters of each group. All ranks call it, any number of them.

    Args:
        context: The run.
        model: The dense network on the run's device.
        orders: Group -> its filters in the order of elimination.

    Returns:
        Group -> the figure on the test images with its last 1, 2, ..., C filters.
    """
    if context.task.name == CLASSIFICATION.name:
        return _top1(context, model, orders)
    measure, ids, loader = Measure(context), _image_ids(context), context.images.loader(False)
    out: dict[str, list[float]] = {}
    for name, order in orders.items():
        points, out[name] = gate_points(context.networks.graph, name), []
        for kept in range(1, len(order) + 1):
            on = torch.zeros(len(order), dtype=torch.bool)
            on[list(order[len(order) - kept :])] = True
            with gate(model, points, {name: on}):
                figures = measure(model, f"the curve of {name}, {kept} kept", ids, loader)
            out[name].append(figures[context.task.primary])
    return out


@torch.no_grad()
def _top1(context: RunContext, model: nn.Module, orders: Mapping[str, Sequence[int]]) -> dict[str, list[float]]:
    """Top-1 in percent, as ``accuracy`` gives the figure; several numbers of filters share a forward pass."""
    spec, ids = context.recipe.information, _image_ids(context)
    comm = context.environment.comm
    masks_of_group = {}
    for name, order in orders.items():
        masks_of_group[name] = torch.zeros((len(order), len(order)), dtype=torch.bool)
        for kept in range(1, len(order) + 1):
            masks_of_group[name][kept - 1, list(order[len(order) - kept :])] = True

    def count(batch: Batch) -> Tensor:
        correct = []
        for name, masks in masks_of_group.items():
            gates = gate_points(context.networks.graph, name)
            for chunk in masks.split(spec.masks):
                with gate(model, gates, {name: chunk}):
                    logits = model(batch.images.repeat(len(chunk), 1, 1, 1))
                correct.append(num_correct(logits.view(len(chunk), len(batch.labels), -1), batch.labels))
        return torch.cat(correct)

    widths = [len(order) for order in orders.values()]
    with evaluation_mode(model):
        counts, images = count_images(
            count,
            sum(widths),
            context.images.loader(False),
            ids,
            context.recipe.evaluate.batch,
            comm,
            context.tracker,
            "the curves of accuracy",
        )
    top1 = (100 * torch.tensor(counts) / images).split(widths)
    return {name: accuracies.tolist() for name, accuracies in zip(orders, top1, strict=True)}


def information(context: RunContext, model: nn.Module, orders: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The information plane with every number of kept filters of each group; jobs are distributed over the ranks.

    Args:
        context: The run.
        model: The dense network on the run's device.
        orders: Group -> its filters in the order of elimination.

    Returns:
        Group -> (C, len(COLUMNS)) figures with its last 1, 2, ..., C filters (see ``InformationPlane``).

    Raises:
        PruneError: Fewer than 2 images.
    """
    spec, ids = context.recipe.information, _image_ids(context)
    loader = replace(context.images.loader(False), transform=replace(context.images.transform, schedule=()))
    scoring = DistributedScoringContext(
        model,
        context.networks.graph,
        loader,
        ids,
        context.environment,
        context.tracker,
        context.recipe.score.micro_batch,
        context.recipe.seed,
    )
    plane = InformationPlane(spec.batch, spec.alpha, spec.sigma_method, spec.sigma_x, spec.sigma_y)
    if len(ids) < 2:
        raise PruneError("information.images: entropies need at least 2 images")
    order = torch.randperm(len(ids), generator=scoring.generator("information", "batches"))
    batches = loader.batches(micro_batches(ids, scoring.micro_batch))
    images = torch.cat([batch.images.flatten(1).cpu() for batch in batches])
    out: dict[str, Tensor] = {}
    names = list(orders)
    for name in names:
        point, maps = _last_reading(scoring, name)
        pixels, labels = images[order], scoring.labels[order]
        activations = point.take(maps)[order]
        chunks = [
            list(range(start, min(start + 16, len(orders[name]) + 1))) for start in range(1, len(orders[name]) + 1, 16)
        ]

        def run(counts: list[int], name: str = name, activations: Tensor = activations) -> Tensor:
            return plane.curve(pixels, labels, activations, orders[name], counts)  # noqa: B023 - called before they change

        out[name] = torch.cat(scoring.map_jobs(chunks, run))
    return out


def _last_reading(scoring: DistributedScoringContext, name: str) -> tuple[ChannelPoint, Tensor]:
    """The point at which a group's channels are read last (the last block of a residual stream); maps (n, C, d)."""
    channel_points = group_inputs(scoring.graph, scoring.graph.group(name))
    hook_points = [channel_point.point for channel_point in channel_points]
    census = scoring.collect(hook_points, ActivationCensus())
    shapes = {point: tuple(state["shape"].tolist()) for point, state in census.items()}
    maps = [tables["maps"] for tables in scoring.collect(hook_points, Activations(shapes)).values()]
    last = distinct(maps)[-1]
    return channel_points[last], maps[last]

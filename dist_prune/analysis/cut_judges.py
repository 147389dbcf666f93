"""How networks that lose channels of one group are judged: masked where a task counts logits, else really cut."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.data.loader import Batch, ImageLoader
from dist_prune.data.sampling import micro_batches
from dist_prune.data.transform_config import AugmentKey
from dist_prune.distributed.communicator import Communicator
from dist_prune.pipeline.context import RunContext
from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.masked_accuracy import Batches, MaskedAccuracyCache
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery import surgeon
from dist_prune.tasks.classification import CLASSIFICATION
from dist_prune.tasks.tallies import count_losses, mean_loss, num_correct
from dist_prune.training.evaluation import evaluate
from dist_prune.training.tracking import Tracker

MEMORY = 2**30  # bytes of images that a rank caches, and as many of activations before the group


class Judged(NamedTuple):
    """What is known of one network.

    Attributes:
        figure: The primary figure of the run's task; nan if it has no value.
        loss: The mean loss; nan if an output is not finite.
        images: Number of images.
    """

    figure: float
    loss: float
    images: int


class Judge(ABC):
    """Judges networks on the same images, each on one rank. Results are JSON values, which a record keeps."""

    @abstractmethod
    def cut(self, name: str, removed: Sequence[int]) -> list[Any]:
        """Judge the network without some channels of one group; none: the whole network."""

    @abstractmethod
    def network(self, small: nn.Module) -> list[Any]:
        """Judge a network that was cut, on the run's device."""

    @abstractmethod
    def read(self, result: Sequence[Any]) -> Judged:
        """What a result says."""


class MaskedJudge(Judge):
    """Counts the logits of masked networks; the layers before a mask run once for all cuts of a group.

    Args:
        model: The network, on the run's device.
        graph: Of the network.
        batches: Images and labels, from a micro-batch on.
    """

    def __init__(self, model: nn.Module, graph: DependencyGraph, batches: Batches):
        self.graph = graph
        self.batches = batches
        self.accuracies = MaskedAccuracyCache(model, graph, batches)

    def cut(self, name: str, removed: Sequence[int]) -> list[int]:
        masked = torch.zeros((1, self.graph.group(name).width), dtype=torch.bool)
        masked[0, list(removed)] = True
        return self.accuracies.for_group(name, "consumed", MEMORY).evaluate(masked, count_metrics)[0].tolist()

    def network(self, small: nn.Module) -> list[int]:
        with torch.no_grad(), evaluation_mode(small):
            return sum(count_metrics(small(x)[None], y)[0] for x, y in self.batches(0)).tolist()  # type: ignore[union-attr]

    def read(self, result: Sequence[Any]) -> Judged:
        correct, loss_units, images, not_finite = result
        return Judged(100 * correct / images, mean_loss(loss_units, not_finite, images), images)


class CutJudge(Judge):
    """Cuts each network and evaluates it as the run's task does.

    Args:
        context: The run.
        model: The network, on the run's device; it is not changed.
        graph: Of the network.
        loader: Of the images.
        ids: (n,) ids of the images.
    """

    def __init__(
        self, context: RunContext, model: nn.Module, graph: DependencyGraph, loader: ImageLoader, ids: np.ndarray
    ):
        self.task, self.batch = context.task, context.recipe.evaluate.batch
        self.model, self.graph, self.ids = model, graph, ids
        self.loader = RememberingLoader(loader, micro_batches(ids, self.batch))
        self.dense = None
        if self.task.compares:
            self.dense = context.networks.load_dense().to(context.environment.device)

    def cut(self, name: str, removed: Sequence[int]) -> list[Any]:
        small = copy.deepcopy(self.model)
        if removed:
            surgeon.apply_plan(small, self.graph, plan_of_cut(self.graph, name, removed))
        return self.network(small)

    def network(self, small: nn.Module) -> list[Any]:
        figures = evaluate(
            small,
            self.loader,
            self.batch,
            Communicator(),  # a job is one rank's own
            Tracker(False),
            "ratio curves",
            self.ids,
            self.task,
            self.dense,
        )
        values = (figures[self.task.primary], figures["loss"])
        return [*(value if math.isfinite(value) else None for value in values), figures["images"]]

    def read(self, result: Sequence[Any]) -> Judged:
        figure, loss = (float("nan") if value is None else float(value) for value in result[:2])
        return Judged(figure, loss, int(result[2]))


def judge_of(
    context: RunContext, model: nn.Module, graph: DependencyGraph, loader: ImageLoader, ids: np.ndarray
) -> Judge:
    """The judge for a run's task.

    Args:
        context: The run.
        model: The network, on the run's device.
        graph: Of the network.
        loader: Of the images.
        ids: (n,) ids of the images, ascending.
    """
    if context.task.name == CLASSIFICATION.name:
        return MaskedJudge(model, graph, cached_images(loader, micro_batches(ids, context.recipe.evaluate.batch)))
    return CutJudge(context, model.eval(), graph, loader, ids)


def plan_of_cut(graph: DependencyGraph, name: str, removed: Sequence[int]) -> Plan:
    """The plan that removes channels of one group.

    Args:
        graph: Of the network.
        name: The group.
        removed: Its channels that go.
    """
    gone = set(removed)
    kept = {g.name: [c for c in range(g.width) if g.name != name or c not in gone] for g in graph.free}
    return Plan.from_kept(graph, kept)


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


def cached_images(loader: ImageLoader, lists: Sequence[np.ndarray]) -> Batches:
    """Read images in micro-batches, and keep as many as ``MEMORY`` allows for the next pass.

    Args:
        loader: The loader of the images.
        lists: The ids of each micro-batch.

    Returns:
        A function from the number of a micro-batch to (images, labels) of it and all that follow.
    """
    remembering = RememberingLoader(loader, lists)

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in remembering.batches(lists[start:]):
            yield batch.images, batch.labels

    return batches


class RememberingLoader(ImageLoader):
    """A loader of fixed lists that keeps as many of its batches as ``MEMORY`` allows for the next pass.

    Args:
        loader: The loader of the images.
        lists: The lists of ids that are asked for, the last ones of them at a time.
    """

    def __init__(self, loader: ImageLoader, lists: Sequence[np.ndarray]):
        vars(self).update(vars(loader))  # the same source, workers and record of skipped images
        self._lists = lists
        self._kept: list[Batch] = []
        self._bytes = 0

    def batches(self, id_lists: Iterable[np.ndarray], augment: AugmentKey | None = None) -> Iterator[Batch]:
        """Load one batch for each list of ids; the lists are the last ones of ``lists``."""
        start = len(self._lists) - len(list(id_lists))
        yield from self._kept[start:]
        first = max(start, len(self._kept))
        if first == len(self._lists):
            return
        for number, batch in enumerate(super().batches(self._lists[first:], augment), first):
            if number == len(self._kept):
                self._bytes += batch.images.numel() * batch.images.element_size()
                if self._bytes <= MEMORY:
                    self._kept.append(batch)
            yield batch

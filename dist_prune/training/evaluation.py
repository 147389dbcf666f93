"""Figures of a network, counted as integers: the results are exact, and the same for every number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.data.loader import Batch, ImageLoader
from dist_prune.data.sampling import micro_batches, shard
from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.tasks.base import Task, in_float
from dist_prune.tasks.classification import CLASSIFICATION
from dist_prune.tasks.tallies import num_correct
from dist_prune.training.tracking import Tracker

__all__ = ["Gallery", "count_images", "evaluate", "num_correct"]


@torch.no_grad()
def count_images(
    count: Callable[[Batch], Tensor],
    length: int,
    loader: ImageLoader,
    ids: np.ndarray,
    batch: int,
    comm: Communicator,
    tracker: Tracker,
    what: str,
    idle: Callable[[], object] = lambda: None,
) -> tuple[list[int], int]:
    """Sum integer counts over the batches of all ranks; a collective, called by every rank.

    Args:
        count: a batch -> (length,) int64 counts on the loader's device.
        length: how many counts a batch has.
        loader: the images.
        ids: (n,) the images; each counts once.
        batch: images of one batch.
        comm: all processes.
        tracker: for the progress bar.
        what: name of the work, for the progress bar and errors.
        idle: called for each batch that the other ranks have and this one has not (or cannot read).

    Returns:
        The ``length`` sums and the number of images that could be read, the same on every rank.

    Raises:
        PruneError: no image could be read.
        PreemptedError: on every rank, if one of them was asked to stop.
    """
    sums = torch.zeros(length, dtype=torch.int64, device=loader.device)  # read once, after the last batch
    images = _visit(sums.add_, count, loader, ids, batch, comm, tracker, what, idle)
    *totals, images = comm.sum_ints(*sums.tolist(), images)
    if not images:
        raise PruneError(f"{what}: none of the {len(ids)} images could be read")
    return totals, images


def _visit(
    add: Callable[[Tensor], object],
    count: Callable[[Batch], Tensor],
    loader: ImageLoader,
    ids: np.ndarray,
    batch: int,
    comm: Communicator,
    tracker: Tracker,
    what: str,
    idle: Callable[[], object],
) -> int:
    """Call ``add(count(batch))`` for the batches of this rank; return the number of its images that could be read."""
    lists = micro_batches(ids, batch)
    own = shard(lists, comm.rank, comm.world)
    batches = loader.batches(own)
    rounds = -(-len(lists) // comm.world)
    images = 0
    for round_number in tracker.bar(range(rounds), rounds, what):
        if preemption.poll(comm)[0]:
            raise preemption.preempted_error(f"in {what}")
        own_batch = next(batches) if round_number < len(own) else None
        if own_batch is None or not len(own_batch.ids):  # none of them could be read (data.on_error: skip)
            idle()
            continue
        add(count(own_batch))
        images += len(own_batch.ids)
    return images


@dataclass(frozen=True)
class Gallery:
    """Training images whose rows the figures get too (see ``Task.gallery_images``).

    Attributes:
        loader: the training images, without augmentation.
        ids: (m,) int64 those that are taken, ascending.
    """

    loader: ImageLoader
    ids: np.ndarray


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: ImageLoader,
    batch: int,
    comm: Communicator,
    tracker: Tracker,
    what: str = "evaluate",
    ids: np.ndarray | None = None,
    task: Task = CLASSIFICATION,
    dense: nn.Module | None = None,
    gallery: Gallery | None = None,
    kept: dict[str, Tensor] | None = None,
) -> dict[str, float]:
    """Evaluate a network on images; a collective, called by every rank.

    All ranks make the same number of forward passes, because sharded weights (ZeRO-3) are gathered in each of them. A
    rank without further images passes an empty image that does not count.

    Args:
        model: on the loader's device; left in evaluation mode.
        loader: the images, without augmentation.
        batch: images of one forward pass.
        comm: all processes.
        tracker: for the progress bar.
        what: name of the evaluation, for the progress bar and errors.
        ids: (n,) the images (default: all); each counts once.
        task: decides what is counted.
        dense: the network that ``model`` is compared with, on the same device, where the task compares; it may be
            ``model`` itself.
        gallery: the training images that the task compares images with, or None.
        kept: takes, if given, what a run keeps beside the figures: the task's ``answers``, (n,) int64 by the order of
            ``ids``, -1 where an image could not be read; and its ``kept_tables``. On the CPU, the same on every rank.

    Returns:
        The task's figures (of a classification ``top1`` and ``top5`` in percent), ``loss``, the mean loss (nan if an
        output is not finite), and ``images``, their number. The same on every rank.

    Raises:
        PruneError: no image could be read.
        PreemptedError: on every rank, if one of them was asked to stop.
    """
    model.eval()
    visit = _Visit(model, task, batch, comm, tracker, dense.eval() if dense is not None else None)
    tables, images = visit.run(loader, np.arange(len(loader)) if ids is None else ids, what, answers=kept)
    if kept is not None:
        kept |= {name: tables[name] for name in task.kept_tables}
    if gallery is not None and len(gallery.ids):
        compared, _ = replace(visit, dense=None).run(gallery.loader, gallery.ids, f"{what}, gallery", counts=False)
        tables |= {f"gallery_{name}": table for name, table in compared.items()}
    return {**task.figures(tables, images), "images": images}


@dataclass(frozen=True)
class _Visit:
    """Passes of one network over lists of images; see ``evaluate``."""

    model: nn.Module
    task: Task
    batch: int
    comm: Communicator
    tracker: Tracker
    dense: nn.Module | None

    def run(
        self,
        loader: ImageLoader,
        ids: np.ndarray,
        what: str,
        counts: bool = True,
        answers: dict[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], int]:
        """The merged tables and rows of the images, on the CPU, and the number of images that could be read.

        Args:
            loader: the images.
            ids: (n,) int64 their ids, ascending.
            what: name of the pass.
            counts: whether the task counts; if False there are rows alone.
            answers: takes the task's answers for each image, if given.
        """
        task = self.task
        empty = torch.zeros((1, *loader.image_shape), dtype=loader.dtype, device=loader.device)
        outputs = len(loader.source.classes)
        shapes = task.tally_shapes(outputs) if counts else {}
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        sums = torch.zeros(sum(sizes), device=loader.device, dtype=torch.int64)  # read once, at the end
        row_shapes = task.row_shapes(outputs)
        if row_shapes is None:
            labels = torch.zeros(1, dtype=torch.int64, device=loader.device)
            one = self._with_reference(Batch(empty, labels, torch.zeros(1, dtype=torch.int64)))
            example = task.rows(in_float(task.forward(self.model, one)), one)
            row_shapes = {name: tuple(values.shape[1:]) for name, values in example.items()}
        if task.gathers_targets:
            row_shapes = {**row_shapes, "targets": loader.target_shape}
        rows = {name: torch.zeros((len(ids), *shape), dtype=torch.float64) for name, shape in row_shapes.items()}
        seen = torch.zeros(len(ids) if rows else 0, dtype=torch.float64)
        names = () if answers is None else task.answer_names
        answered = torch.zeros((len(names), len(ids)), device=loader.device, dtype=torch.int64)  # answers + 1; 0: none

        def count(part: Batch) -> Tensor:
            found = in_float(task.forward(self.model, part))
            part = self._with_reference(part, found)
            positions = torch.from_numpy(np.searchsorted(ids, part.ids.numpy())) if rows or names else None
            if names and positions is not None:
                own_answers = task.answers(found, part)
                columns = torch.stack([own_answers[name] for name in names]) + 1
                answered.index_copy_(1, positions.to(loader.device, non_blocking=True), columns)
            if rows and positions is not None:
                seen[positions] = 1
                own = {**task.rows(found, part), **({"targets": part.labels} if task.gathers_targets else {})}
                for name, values in own.items():
                    rows[name][positions] = values.double().cpu()
            tables = task.tally(found, part) if shapes else {}
            return torch.cat([tables[name].reshape(-1) for name in shapes]) if shapes else sums

        def idle() -> None:
            self.model(empty)

        images = _visit(sums.add_, count, loader, ids, self.batch, self.comm, self.tracker, what, idle)
        *totals, images = self.comm.sum_ints(*sums.tolist(), images)
        if not images:
            raise PruneError(f"{what}: none of the {len(ids)} images could be read")
        self.comm.all_reduce("rows", [*rows.values(), seen] if rows else [])  # a row is zero on all ranks but one
        if names and answers is not None:  # an image has an answer on one rank, so the sums are exact
            self.comm.all_reduce("sum", [answered])
            answers |= dict(zip(names, (answered - 1).cpu(), strict=True))
        counted = torch.tensor(totals, dtype=torch.int64).split(sizes)
        tables = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), counted, strict=True)}
        return tables | {name: table[seen > 0] for name, table in rows.items()}, images

    def _with_reference(self, part: Batch, found: Any = None) -> Batch:
        """The batch with the outputs of the dense network, if there is one."""
        if self.dense is None:
            return part
        same = self.dense is self.model and found is not None
        return replace(part, reference=found if same else in_float(self.task.forward(self.dense, part)))

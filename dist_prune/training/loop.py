"""The training loop, for dense training, finetuning, masked retraining and learned gates."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.config.training import Training
from dist_prune.data import sampling
from dist_prune.data.loader import Batch, ImageLoader
from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.errors import PruneError
from dist_prune.tasks.tallies import HUGE, LOSS_UNIT
from dist_prune.training import optim
from dist_prune.training.engine import TrainEngine
from dist_prune.training.tracking import Tracker

Losses = Callable[[Batch, int, int], Tensor]  # batch, epoch, step -> (n,) loss of each image
NORM_EVERY = 16  # updates between two measurements of the gradient norm if it is not clipped


@dataclass
class Progress:
    """Progress within an epoch and its figures so far, of this rank or, once merged, of all ranks.

    Checkpoints save it by the names of its fields.

    Attributes:
        step: number of steps done.
        loss_units: sum of the images' losses in units of 1 / LOSS_UNIT.
        images: number of images.
        hits: number of correct predictions.
        skipped: number of updates left out because of a loss that was not finite.
        grad_norm: the last gradient norm; a tensor until the merge, so that no step waits for the device.
    """

    step: int = 0
    loss_units: int = 0
    images: int = 0
    hits: int = 0
    skipped: int = 0
    grad_norm: float | Tensor = 0.0

    def add(self, figures: "StepFigures | None") -> None:
        """Add the figures of a step; None adds nothing."""
        if figures is None:
            return
        loss, hits = figures.read
        self.loss_units += round(loss * LOSS_UNIT)
        self.images += len(figures.ids)
        self.hits += hits


@dataclass
class StepFigures:
    """Loss and hits of one step of this rank, which are copied from the device in the background.

    Attributes:
        values: (micro-batches + 1,) float64: the summed losses of the micro-batches, then the hits (exact in float64).
        arrived: the event after the copy to the host, or None if ``values`` is read as it is.
        ids: (n,) the images of the step.
        step: its number in the epoch, from 0.
        rate: its learning rate.
    """

    values: Tensor
    arrived: torch.cuda.Event | None
    ids: Tensor
    step: int
    rate: float

    @classmethod
    def of(cls, sums: Sequence[Tensor], hits: Tensor | None, ids: Tensor, step: int, rate: float) -> "StepFigures":
        """Start the copy of a step's figures to the host.

        Args:
            sums: () sum of the losses of each micro-batch, on the device.
            hits: () number of correct predictions, on the device, or None.
            ids: (n,) the images of the step.
            step: its number in the epoch, from 0.
            rate: its learning rate.
        """
        hits = torch.zeros_like(sums[0]) if hits is None else hits
        values = torch.stack([value.double() for value in (*sums, hits)])
        if values.device.type != "cuda":
            return cls(values, None, ids, step, rate)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(host, arrived, ids, step, rate)

    @cached_property
    def read(self) -> tuple[float, int]:
        """The sum of the losses and the hits; waits until they have arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        *sums, hits = self.values.tolist()
        return sum(sums), int(hits)

    @property
    def is_bad(self) -> bool:
        """Whether the mean loss is not finite, or larger than ``HUGE``; waits until it has arrived."""
        return not abs(self.read[0]) <= HUGE * len(self.ids)


@dataclass
class Loop:
    """Settings, images and callbacks of a training, and its epochs. Every rank has one and calls its methods.

    Attributes:
        settings: epochs, global batch, optimizer and schedule.
        loader: training images.
        environment: device and ranks.
        tracker: for the progress bar.
        seed: seed of order and augmentation, with the number of the epoch.
        name: of the training, for progress and messages.
        ids: (n,) the images to train on (default: all, or the first ``settings.images``).
        save: called on every rank with the epoch and its progress when a checkpoint is due or the run is asked to
            stop; None for no checkpoints.
        after: called after every update (averaged weights, masks).
        last_good: returns the path of the last good checkpoint, or None; called on every rank.
        hits: returns the number of correct predictions of this rank since its last call, () on the device; or None.
        hit_name: name of the figure of correct predictions.
        skipped: number of updates that earlier epochs left out.
        first_epoch: number of epochs of earlier rounds: order and augmentation continue after them.
        progress: merged progress of the present (or last) epoch.
    """

    settings: Training
    loader: ImageLoader
    environment: DistributedEnvironment
    tracker: Tracker
    seed: int
    name: str = "train"
    ids: np.ndarray | None = None
    save: Callable[[int, Progress], None] | None = None
    after: Callable[[], None] = lambda: None
    hits: Callable[[], Tensor | None] | None = None
    hit_name: str = "hits"
    last_good: Callable[[], str | None] = lambda: None
    skipped: int = 0
    first_epoch: int = 0
    progress: Progress = field(default_factory=Progress)
    _saved_at: float = field(default_factory=time.monotonic, repr=False)

    def __post_init__(self):
        if self.ids is None:
            self.ids = np.arange(min(len(self.loader), self.settings.images or len(self.loader)))

    @property
    def images_per_epoch(self) -> int:
        """Number of training images in an epoch."""
        assert self.ids is not None
        return len(self.ids)

    @property
    def steps_per_epoch(self) -> int:
        """Number of updates in an epoch."""
        return sampling.steps_per_epoch(self.images_per_epoch, self.settings.batch)

    def run_epoch(
        self,
        number: int,
        losses_of: Losses,
        engine: TrainEngine,
        schedule: optim.LearningRate,
        watch: Callable[[int], None] = lambda step: None,
        begin: Progress | None = None,
    ) -> dict[str, float]:
        """Train for one epoch; a collective, called by every rank.

        Args:
            number: of the epoch, from 0.
            losses_of: (batch, epoch, step) -> (n,) losses of its images.
            engine: gradients and updates.
            schedule: the learning rate.
            watch: called after each update with its number since the beginning of the training, from 0.
            begin: merged progress at which an interrupted epoch resumes.

        Returns:
            Figures over all ranks: ``loss`` (mean), ``lr``, ``images_per_s``, ``seconds``, ``grad_norm``,
            ``data_wait`` (share of the time in which this rank waited for images); if counted, ``hit_name`` (percent),
            ``skipped_updates`` and, on a GPU, ``gpu_memory_mb`` (MiB, at most so far).

        Raises:
            PreemptedError: on every rank, after one of them was asked to stop; ``save`` was called before.
            PruneError: on every rank, if more losses than ``skip_nonfinite`` are not finite.
        """
        comm = self.environment.comm
        total = self.steps_per_epoch
        merged = begin or Progress()
        first_step, done_before = merged.step, merged.images
        local, pending = Progress(first_step), None
        start, waited = time.perf_counter(), 0.0
        batches = self._batches(number, first_step)
        schedule.set_for(number * total + max(first_step - 1, 0))
        rate = schedule.rate
        caption = f"{self.name}, epoch {number + 1} of {max(number + 1, self.settings.epochs)}"
        later = max(0, self.settings.epochs - number - 1) * total
        for _ in self.tracker.bar(range(first_step, total), total - first_step, caption, later):
            before = time.perf_counter()
            batch, batch_size = next(batches)
            waited += time.perf_counter() - before
            schedule.set_for(number * total + local.step)
            rate = schedule.rate
            torch.manual_seed(
                hash((self.seed, self.first_epoch + number, local.step, comm.rank)) % 2**63
            )  # dropout and the like
            engine.zero_grad()
            buffers = self._buffers(engine)
            sums = self._backward(batch, batch_size, self.first_epoch + number, local.step, losses_of, engine)
            newest = StepFigures.of(sums, self.hits() if self.hits is not None else None, batch.ids, local.step, rate)
            # if no update may be skipped, a step is read during the next one, so that no step waits for the device
            checked = newest if self.settings.skip_nonfinite else pending
            stop, due, bad = preemption.poll(
                comm, (self._due(local.step + 1), int(checked is not None and checked.is_bad))
            )
            if bad:
                assert checked is not None
                local.skipped += 1
                if self.skipped + merged.skipped + local.skipped > self.settings.skip_nonfinite:
                    self._raise_diverged(number, checked)
                engine.zero_grad()
                for buffer, before in buffers:
                    buffer.copy_(before)
            else:
                measured = local.step % NORM_EVERY == 0
                norm = engine.step(self.settings.clip_grad, measured)
                local.grad_norm = local.grad_norm if norm is None else norm
                self.after()
                local.add(checked)
            pending = None if self.settings.skip_nonfinite else newest
            local.step += 1
            watch(number * total + local.step - 1)
            if self.save is not None and (stop or (due and local.step < total)):
                self._settle(number, pending, local)
                pending, merged = None, self._merge(merged, local)
                self.save(number, merged)
                self._saved_at = time.monotonic()
            if stop:
                raise preemption.preempted_error(
                    f"in {self.name}, epoch {number + 1}, after step {local.step} of {total}"
                )
        self._settle(number, pending, local)
        merged = self._merge(merged, local)
        self.skipped += merged.skipped
        seconds = time.perf_counter() - start
        figures = {
            "loss": merged.loss_units / LOSS_UNIT / max(merged.images, 1), "lr": rate,
            "images_per_s": (merged.images - done_before) / seconds, "seconds": seconds,
            "grad_norm": float(merged.grad_norm), "data_wait": waited / seconds,
        }  # fmt: skip
        if self.hits is not None:
            figures[self.hit_name] = 100 * merged.hits / max(merged.images, 1)
        if merged.skipped:
            figures["skipped_updates"] = merged.skipped
        if self.environment.device.type == "cuda":
            figures["gpu_memory_mb"] = torch.cuda.max_memory_allocated(self.environment.device) / 2**20
        return figures

    def _batches(self, number: int, start: int) -> Iterator[tuple[Batch, int]]:
        assert self.ids is not None
        comm, number = self.environment.comm, self.first_epoch + number
        shards = list(
            sampling.epoch_batches(self.images_per_epoch, self.settings.batch, self.seed, number, comm.rank, comm.world)
        )[start:]
        batches = self.loader.batches([self.ids[indices] for indices, _ in shards], augment=(self.seed, number))
        for batch, (_, batch_size) in zip(batches, shards, strict=True):
            yield batch, batch_size

    def _backward(
        self, batch: Batch, batch_size: int, epoch: int, step: int, losses_of: Losses, engine: TrainEngine
    ) -> list[Tensor]:
        """Add the gradients of the global batch's mean loss; return the sum of this rank's losses by micro-batch."""
        sums = []
        pieces = sampling.accumulation_steps(batch_size, self.settings.accumulate, self.environment.comm.world)
        for number, piece in enumerate(_split(batch, pieces)):
            with engine.micro_step(last=number + 1 == pieces):
                total = losses_of(piece, epoch, step).sum()
                # gradients are averaged over ranks: this scale makes the average the mean over the whole batch
                engine.backward(total * (self.environment.comm.world / batch_size))
            sums.append(total.detach())
        return sums

    def _settle(self, number: int, pending: "StepFigures | None", local: Progress) -> None:
        """Read the last step, before anything is saved or reported; called on every rank."""
        if self.settings.skip_nonfinite:
            return
        if self.environment.comm.max_ints(int(pending is not None and pending.is_bad))[0]:
            assert pending is not None
            self._raise_diverged(number, pending)
        local.add(pending)

    def _raise_diverged(self, number: int, figures: "StepFigures") -> NoReturn:
        own_ids = figures.ids.tolist() if figures.is_bad else []
        ids = [sample for rank_ids in self.environment.comm.all_gather_object(own_ids) for sample in rank_ids]
        raise PruneError(self._diverged_text(number, figures.step, figures.rate, ids))

    def _buffers(self, engine: TrainEngine) -> list[tuple[Tensor, Tensor]]:
        """(buffer, copy): to undo the update of running statistics by a forward pass whose loss is not finite."""
        if not self.settings.skip_nonfinite or engine.model is None:
            return []
        return [(buffer, buffer.clone()) for buffer in engine.model.buffers()]

    def _due(self, step: int) -> int:
        s = self.settings
        by_steps = s.save_every_steps is not None and step % s.save_every_steps == 0
        by_time = self.environment.comm.is_main and time.monotonic() - self._saved_at > 60 * s.checkpoint_every_minutes
        return int(self.save is not None and (by_steps or by_time))

    def _merge(self, merged: Progress, local: Progress) -> Progress:
        """Add the progress of all ranks since the last merge; ``local`` is reset."""
        units, images, hits = self.environment.comm.sum_ints(local.loss_units, local.images, local.hits)
        self.progress = Progress(
            local.step, merged.loss_units + units, merged.images + images, merged.hits + hits,
            merged.skipped + local.skipped, float(local.grad_norm) or merged.grad_norm,
        )  # fmt: skip
        local.loss_units = local.images = local.hits = local.skipped = 0
        return self.progress

    def _diverged_text(self, epoch: int, step: int, rate: float, ids: list[int]) -> str:
        shown = f"{ids[:8]}{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}"
        good = self.last_good()
        return (
            f"{self.name}: the loss is not finite (or huge) at epoch {epoch + 1}, step {step + 1}, learning rate "
            f"{rate:.3g} (sample ids {shown}). The last good checkpoint is {good or 'none yet'}; run again with "
            f"{self.name}.skip_nonfinite above {self.settings.skip_nonfinite} to resume there and leave such "
            f"updates out. A smaller {self.name}.lr, a longer {self.name}.warmup_epochs or {self.name}.clip_grad make "
            "it another training, which starts over."
        )


def _split(batch: Batch, count: int) -> Iterator[Batch]:
    """Split a batch into exactly ``count`` micro-batches, as equal as possible."""
    tensors = (tensor.tensor_split(count) for tensor in (batch.images, batch.labels, batch.ids))
    for images, labels, ids in zip(*tensors, strict=True):
        yield Batch(images, labels, ids)


def gradient_averager(parameters: Sequence[nn.Parameter], comm: Communicator) -> Callable[[], None]:
    """Make a function that averages gradients over the ranks, for models without a wrapper.

    Args:
        parameters: their gradients are averaged in place; a missing one counts as zero.
        comm: all processes; every rank calls the function, which is a collective.
    """

    def sync() -> None:
        for parameter in parameters:
            if parameter.grad is None:  # without a gradient on this rank; another one may have it
                parameter.grad = torch.zeros_like(parameter)
        if comm.world == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        comm.all_reduce("sum", grads)
        for grad in grads:
            grad.div_(comm.world)

    return sync

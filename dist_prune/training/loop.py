"""The one training loop: dense training, finetuning, masked retraining and learned gates all go through it."""

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
from dist_prune.training import optim
from dist_prune.training.engine import TrainEngine
from dist_prune.training.evaluation import HUGE, LOSS_UNIT
from dist_prune.training.tracking import Tracker

Losses = Callable[[Batch, int, int], Tensor]  # batch, epoch, step -> (n,) loss of each image
NORM_EVERY = 16  # updates between two looks at the gradient's norm where it is not clipped


@dataclass
class Progress:
    """How far an epoch is, and what its figures are so far (over all ranks once merged)."""

    step: int = 0
    loss_units: int = 0
    images: int = 0
    hits: int = 0
    skipped: int = 0
    grad_norm: float | Tensor = 0.0  # a tensor until it is merged: nobody waits for it before

    def add(self, told: "StepFigures | None") -> None:
        """Count a step that went well."""
        if told is None:
            return
        value, right = told.read
        self.loss_units += round(value * LOSS_UNIT)
        self.images += len(told.ids)
        self.hits += right


@dataclass
class StepFigures:
    """Loss and hits of one step of this rank, on their way from the device; reading them waits until they are there.

    Attributes:
        values: (pieces + 1,) float64: the summed losses of the pieces, then the hits, which are whole in float64.
        arrived: the event behind the copy to the host, or None where ``values`` is read as it is.
        ids: (n,) the images of the step.
        step, rate: its number in the epoch and its learning rate.
    """

    values: Tensor
    arrived: torch.cuda.Event | None
    ids: Tensor
    step: int
    rate: float

    @classmethod
    def of(cls, sums: Sequence[Tensor], hits: Tensor | None, ids: Tensor, step: int, rate: float) -> "StepFigures":
        """Begin the copy of a step's summed losses, () each, and its hits, ()."""
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
        """The sum of the losses and the hits: one copy to the host for both."""
        if self.arrived is not None:
            self.arrived.synchronize()
        *sums, hits = self.values.tolist()
        return sum(sums), int(hits)

    @property
    def is_bad(self) -> bool:
        """Whether the loss is not finite, or huge."""
        return not abs(self.read[0]) <= HUGE * len(self.ids)


@dataclass
class Loop:
    """What every training run shares.

    Attributes:
        settings: epochs, global batch, optimizer and schedule.
        loader: training images.
        seed: with the epoch it decides the order and the augmentation.
        ids: (n,) the images to train on (default: all, or the first ``settings.images``).
        save: called with the epoch and its progress when a checkpoint is due or the run is asked to stop.
        after: called after every update (averaged weights, masks).
        newest: the last good checkpoint's place, or None.
        hits: how many images of this rank were classified right since it was asked last, () on the device; or None.
        skipped: updates that earlier epochs left out.
        first: epochs that earlier rounds did: order and augmentation go on behind them.
        reached: how far the epoch at work (or the last one) is, as of the last merge.
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
    hits: Callable[[], Tensor] | None = None
    newest: Callable[[], str | None] = lambda: None
    skipped: int = 0
    first: int = 0
    reached: Progress = field(default_factory=Progress)
    _saved_at: float = field(default_factory=time.monotonic, repr=False)

    def __post_init__(self):
        if self.ids is None:
            self.ids = np.arange(min(len(self.loader), self.settings.images or len(self.loader)))

    @property
    def images_per_epoch(self) -> int:
        """Training images per epoch."""
        assert self.ids is not None
        return len(self.ids)

    @property
    def steps_per_epoch(self) -> int:
        """Updates per epoch."""
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
        """One epoch over all ranks; returns its figures.

        Args:
            number: the epoch, from 0.
            losses_of: losses of the images of a batch.
            engine: makes updates out of gradients.
            watch: called after each update with its number since the beginning.
            begin: where an interrupted epoch goes on.
        """
        comm, total, at = self.environment.comm, self.steps_per_epoch, begin or Progress()
        start, waited, done_before = time.perf_counter(), 0.0, at.images
        merged, local, pending = at, Progress(at.step), None
        batches = self._batches(number, at.step)
        schedule.set_for(number * total + max(at.step - 1, 0))
        rate = schedule.rate
        for _ in self.tracker.bar(range(at.step, total), total - at.step, f"{self.name}, epoch {number + 1}"):
            before = time.perf_counter()
            part, whole = next(batches)
            waited += time.perf_counter() - before
            schedule.set_for(number * total + local.step)
            rate = schedule.rate
            torch.manual_seed(
                hash((self.seed, self.first + number, local.step, comm.rank)) % 2**63
            )  # dropout and the like
            engine.zero_grad()
            held = self._buffers(engine)
            sums = self._backward(part, whole, self.first + number, local.step, losses_of, engine)
            newest = StepFigures.of(sums, self.hits() if self.hits is not None else None, part.ids, local.step, rate)
            # where nothing may be skipped, a step is read while the next one is under way: nobody waits for the device
            told = newest if self.settings.skip_nonfinite else pending
            stop, due, strange = preemption.poll(
                comm, (self._due(local.step + 1), int(told is not None and told.is_bad))
            )
            if strange:
                assert told is not None
                local.skipped += 1
                if self.skipped + merged.skipped + local.skipped > self.settings.skip_nonfinite:
                    self._refuse(number, told)
                engine.zero_grad()
                for buffer, before in held:
                    buffer.copy_(before)
            else:
                measured = local.step % NORM_EVERY == 0
                norm = engine.step(self.settings.clip_grad, measured)
                local.grad_norm = local.grad_norm if norm is None else norm
                self.after()
                local.add(told)
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
            figures["top1"] = 100 * merged.hits / max(merged.images, 1)
        if merged.skipped:
            figures["skipped_updates"] = merged.skipped
        if self.environment.device.type == "cuda":
            figures["gpu_memory_mb"] = torch.cuda.max_memory_allocated(self.environment.device) / 2**20
        return figures

    def _batches(self, number: int, done: int) -> Iterator[tuple[Batch, int]]:
        assert self.ids is not None
        comm, number = self.environment.comm, self.first + number
        dealt = list(
            sampling.epoch_batches(self.images_per_epoch, self.settings.batch, self.seed, number, comm.rank, comm.world)
        )[done:]
        feed = self.loader.batches([self.ids[places] for places, _ in dealt], augment=(self.seed, number))
        for part, (_, whole) in zip(feed, dealt, strict=True):
            yield part, whole

    def _backward(
        self, part: Batch, whole: int, epoch: int, step: int, losses_of: Losses, engine: TrainEngine
    ) -> list[Tensor]:
        """Gradients of the mean loss over the whole batch; returns the sum of this rank's losses in each piece."""
        sums, pieces = [], sampling.accumulation_steps(whole, self.settings.accumulate, self.environment.comm.world)
        for number, piece in enumerate(_pieces(part, pieces)):
            with engine.micro_step(last=number + 1 == pieces):
                total = losses_of(piece, epoch, step).sum()
                # gradients are averaged over ranks: this scale makes the average the mean over the whole batch
                engine.backward(total * (self.environment.comm.world / whole))
            sums.append(total.detach())
        return sums

    def _settle(self, number: int, pending: "StepFigures | None", local: Progress) -> None:
        """Read the step that was not read yet, before anything is saved or told; called on every rank."""
        if self.settings.skip_nonfinite:
            return
        if self.environment.comm.max_ints(int(pending is not None and pending.is_bad))[0]:
            assert pending is not None
            self._refuse(number, pending)
        local.add(pending)

    def _refuse(self, number: int, told: "StepFigures") -> NoReturn:
        guilty = told.ids.tolist() if told.is_bad else []
        ids = [sample for found in self.environment.comm.all_gather_object(guilty) for sample in found]
        raise PruneError(self._diverged(number, told.step, told.rate, ids))

    def _buffers(self, engine: TrainEngine) -> list[tuple[Tensor, Tensor]]:
        """(buffer, its values): a forward pass that turns out strange has left its mark in the running statistics."""
        if not self.settings.skip_nonfinite or engine.model is None:
            return []
        return [(buffer, buffer.clone()) for buffer in engine.model.buffers()]

    def _due(self, step: int) -> int:
        s = self.settings
        by_steps = s.save_every_steps is not None and step % s.save_every_steps == 0
        by_time = self.environment.comm.is_main and time.monotonic() - self._saved_at > 60 * s.checkpoint_every_minutes
        return int(self.save is not None and (by_steps or by_time))

    def _merge(self, merged: Progress, local: Progress) -> Progress:
        """Add what all ranks did since the last merge; ``local`` starts over."""
        units, images, hits = self.environment.comm.sum_ints(local.loss_units, local.images, local.hits)
        self.reached = Progress(
            local.step, merged.loss_units + units, merged.images + images, merged.hits + hits,
            merged.skipped + local.skipped, float(local.grad_norm) or merged.grad_norm,
        )  # fmt: skip
        local.loss_units = local.images = local.hits = local.skipped = 0
        return self.reached

    def _diverged(self, epoch: int, step: int, rate: float, ids: list[int]) -> str:
        shown = f"{ids[:8]}{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}"
        good = self.newest()
        return (
            f"{self.name}: the loss is not finite (or huge) at epoch {epoch + 1}, step {step + 1}, learning rate "
            f"{rate:.3g} (sample ids {shown}). The last good checkpoint is {good or 'none yet'}; run again with "
            f"{self.name}.skip_nonfinite above {self.settings.skip_nonfinite} to go on from there and leave such "
            f"updates out. A smaller {self.name}.lr, a longer {self.name}.warmup_epochs or {self.name}.clip_grad make "
            "it another training, which starts over."
        )


def _pieces(part: Batch, count: int) -> Iterator[Batch]:
    """Exactly ``count`` pieces, as equal as can be."""
    cut = (tensor.tensor_split(count) for tensor in (part.images, part.labels, part.ids))
    for images, labels, ids in zip(*cut, strict=True):
        yield Batch(images, labels, ids)


def gradient_averager(parameters: Sequence[nn.Parameter], comm: Communicator) -> Callable[[], None]:
    """What averages gradients over ranks where no wrapper does."""

    def sync() -> None:
        for parameter in parameters:
            if parameter.grad is None:  # not touched on this rank; it may be on another
                parameter.grad = torch.zeros_like(parameter)
        if comm.world == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        comm.all_reduce("sum", grads)
        for grad in grads:
            grad.div_(comm.world)

    return sync

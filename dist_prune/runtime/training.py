"""The one training loop: dense training, finetuning and learned gates all go through it."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.errors import PruneError
from dist_prune.recipe import Training
from dist_prune.runtime import checkpoint
from dist_prune.runtime.collectives import Ranks
from dist_prune.runtime.data import dealing
from dist_prune.runtime.data.feed import Batch, Feed
from dist_prune.runtime.evaluation import LOSS_UNIT
from dist_prune.runtime.machine import Machine
from dist_prune.runtime.tracking import Tracker

Loss = Callable[[Batch], Tensor]  # batch -> (n,) loss of each image


@dataclass
class Loop:
    """What every training run shares.

    Attributes:
        settings: epochs, global batch, optimizer and schedule.
        feed: training images.
        seed: with the epoch it decides the order and the augmentation.
    """

    settings: Training
    feed: Feed
    machine: Machine
    tracker: Tracker
    seed: int
    name: str = "train"

    @property
    def images(self) -> int:
        """Training images per epoch."""
        return min(len(self.feed), self.settings.images or len(self.feed))

    def run_epoch(
        self,
        number: int,
        loss_of: Loss,
        optimizer: torch.optim.Optimizer,
        sync: Callable[[], None] = lambda: None,
        watch: Callable[[int], None] = lambda step: None,
    ) -> dict[str, float]:
        """One epoch over all ranks; returns its mean loss, learning rate and images per second.

        Args:
            number: the epoch, from 0.
            loss_of: losses of the images of a batch.
            sync: averages gradients over ranks where the model is not wrapped.
            watch: called after each step with its number since the beginning.
        """
        ranks, batch = self.machine.ranks, self.settings.batch
        total = dealing.steps(self.images, batch, ranks.world)
        dealt = list(dealing.epoch(self.images, batch, self.seed, number, ranks.rank, ranks.world))
        batches = self.feed.batches([ids for ids, _ in dealt], augment=(self.seed, number))
        torch.manual_seed(self.seed * 1_000_003 + number * 1_009 + ranks.rank)  # dropout and the like
        start, units, seen = time.perf_counter(), 0, 0
        rate = 0.0
        for step, part in enumerate(self.tracker.bar(batches, total, f"{self.name}, epoch {number + 1}")):
            rate = self.rate(number + step / total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses = loss_of(part)
            # gradients are averaged over ranks: this scale makes the average the mean over the whole batch
            loss = losses.sum() * (ranks.world / dealt[step][1])
            value = float(losses.detach().sum())
            if not math.isfinite(value):
                raise PruneError(self._diverged(number, step, rate, part))
            optimizer.zero_grad(set_to_none=True)
            self.machine.backward(loss)
            sync()
            optimizer.step()
            watch(number * total + step)
            units += round(value * LOSS_UNIT)
            seen += len(part.ids)
        units, seen = ranks.total(units, seen)
        seconds = time.perf_counter() - start
        return {"loss": units / LOSS_UNIT / seen, "lr": rate, "images_per_s": seen / seconds, "seconds": seconds}

    def rate(self, epochs: float) -> float:
        """The learning rate after a number of epochs (fractions count for warm-up and cosine)."""
        s = self.settings
        if epochs < s.warmup_epochs:
            return s.lr * (epochs + 1e-3) / s.warmup_epochs
        if s.schedule == "step":
            return s.lr * s.gamma ** (int(epochs) // s.step_size)
        if s.schedule == "multistep":
            return s.lr * s.gamma ** sum(int(epochs) >= milestone for milestone in s.milestones)
        if s.schedule == "cosine":
            done = (epochs - s.warmup_epochs) / max(s.epochs - s.warmup_epochs, 1e-9)
            return s.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return s.lr

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """SGD with the settings' momentum and weight decay."""
        s = self.settings
        return torch.optim.SGD(
            list(parameters), s.lr, momentum=s.momentum, weight_decay=s.weight_decay, nesterov=s.nesterov
        )

    def _diverged(self, epoch: int, step: int, rate: float, part: Batch) -> str:
        ids = part.ids.tolist()
        return (
            f"{self.name}: the loss is not finite at epoch {epoch + 1}, step {step + 1}, learning rate {rate:.3g} "
            f"(sample ids {ids[:8]}{' ...' if len(ids) > 8 else ''}). The last finished epoch is kept; run again with "
            f"a smaller {self.name}.lr or a longer {self.name}.warmup_epochs."
        )


def train(
    model: nn.Module,
    loop: Loop,
    evaluate: Callable[[nn.Module], Mapping[str, float]],
    saves: Path | None = None,
    identity: str = "",
) -> list[dict[str, float]]:
    """Train ``model`` in place by cross-entropy; returns a line of figures per epoch.

    Args:
        model: a bare model on any device; it is wrapped for all ranks here and bare again afterwards.
        loop: settings, images, machine.
        evaluate: figures (``top1``, ``loss`` ...) of the model, called on every rank.
        saves: the checkpoint file, written after every epoch by the first rank; training goes on from it.
        identity: what the checkpoint must belong to; another one is ignored.
    """
    machine, ranks, settings = loop.machine, loop.machine.ranks, loop.settings
    model.to(machine.device)
    optimizer = loop.optimizer(model.parameters())
    first, history = _resume(model, optimizer, saves, identity)
    if first:
        loop.tracker.say(f"  {loop.name}: goes on after epoch {first} of {settings.epochs}")
    if first < settings.epochs:
        wrapped, ready = machine.wrap(model, optimizer)

        def loss_of(part: Batch) -> Tensor:
            return functional.cross_entropy(wrapped(part.images), part.labels, reduction="none")

        for number in range(first, settings.epochs):
            wrapped.train()
            line: dict[str, float] = {"epoch": number + 1, **loop.run_epoch(number, loss_of, ready)}
            _same_buffers(model, ranks)
            if (number + 1) % settings.evaluate_every == 0 or number + 1 == settings.epochs:
                line |= {f"test_{key}": value for key, value in evaluate(model).items()}
            history.append(line)
            _tell(loop, line)
            if saves is not None:
                ranks.together(lambda: _save(saves, model, optimizer, identity, history))
    return history


def fit(
    parameters: Sequence[nn.Parameter], loss_of: Loss, loop: Loop, watch: Callable[[int], None] = lambda step: None
) -> list[dict[str, float]]:
    """Train loose parameters (gates) of a bare model through the same loop; gradients are averaged over ranks here."""
    optimizer, ranks = loop.optimizer(parameters), loop.machine.ranks

    def sync() -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        ranks.merge("sum", grads)
        for grad in grads:
            grad.div_(ranks.world)

    return [
        {"epoch": number + 1, **loop.run_epoch(number, loss_of, optimizer, sync, watch)}
        for number in range(loop.settings.epochs)
    ]


def _same_buffers(model: nn.Module, ranks: Ranks) -> None:
    """The first rank's batch-norm statistics everywhere: they are what is evaluated and kept."""
    for buffer in model.buffers():
        buffer.copy_(ranks.broadcast(buffer))


def _tell(loop: Loop, line: Mapping[str, float]) -> None:
    top1 = f", test top-1 {line['test_top1']:.2f} %" if "test_top1" in line else ""
    loop.tracker.say(
        f"  {loop.name} {line['epoch']:.0f}/{loop.settings.epochs}: loss {line['loss']:.4f}{top1}, "
        f"lr {line['lr']:.4g}, {line['images_per_s']:.0f} images/s"
    )
    loop.tracker.scalars({f"{loop.name}/{k}": v for k, v in line.items() if k != "epoch"}, int(line["epoch"]))


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: str, history: list[Any]) -> None:
    tensors, plain = checkpoint.pack(optimizer)
    named = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"optimizer.{k}": v for k, v in tensors.items()}
    checkpoint.save(path, named, {"identity": identity, "optimizer": plain, "history": history})


def _resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: Path | None, identity: str
) -> tuple[int, list[dict[str, float]]]:
    if path is None or not path.exists():
        return 0, []
    tensors, meta = checkpoint.read(path)
    if meta.get("identity") != identity:
        return 0, []
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    states = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
    checkpoint.unpack(optimizer, states, meta["optimizer"])
    return len(meta["history"]), meta["history"]

"""Syncs, bytes and operations per step, per micro-batch and per batch, on the pretend device; syncs on a real one.

Each figure is a slope: the same work is done on fewer and on more batches, and the difference is divided by theirs. So
what is done once, at the beginning or behind the last batch, is not in it.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dist_prune import methods, models
from dist_prune.config.training import Training
from dist_prune.data.datasets import ArraySource
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.sampling import micro_batches
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.pruning.sparse_learning import sparsity_gradient
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training import optim
from dist_prune.training.evaluation import evaluate
from dist_prune.training.loop import Loop
from dist_prune.training.tracking import Tracker
from dist_prune.training.trainer import Trainer
from tests.support import pretend_device
from tests.support.pretend_device import Traffic

FEW, MORE = 2, 4  # batches
# methods that wait for nothing in a micro-batch
QUIET = ("graph", "taylor", "apoz", "fisher", "group_fisher", "obd", "mint", "l1", "l2", "bn_scale", "whc")


@dataclass(frozen=True)
class Each:
    """Per batch: host-device synchronisations, bytes to the device and back, operations; what the host waited for."""

    syncs: float
    up: float
    down: float
    operations: float
    waits: dict[str, float]


@dataclass(frozen=True)
class Bed:
    """A network and images of noise.

    Attributes:
        name, size: network and side of its images.
        batch: images of a step, a micro-batch and an evaluation batch.
        ranks: among which they are dealt.
        kind: ``pretend``, or ``cuda``: there torch itself tells of synchronisations, and nothing else is counted.
    """

    name: str = "resnet20_cifar"
    size: int = 8
    batch: int = 4
    ranks: Communicator = field(default_factory=Communicator)
    kind: str = "pretend"

    @property
    def machine(self) -> DistributedEnvironment:
        device = pretend_device.start() if self.kind == "pretend" else torch.device(self.kind)
        return DistributedEnvironment(device, replace(self.ranks, device=device))

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return models.create(self.name, 10, 3, kwargs={"img_size": self.size})

    def feed(self, **look: Any) -> ImageLoader:
        rng, count = np.random.default_rng(0), MORE * self.batch
        pixels = rng.integers(0, 256, (count, self.size, self.size, 3), dtype=np.uint8)
        source = ArraySource(pixels, rng.integers(0, 10, count), tuple(map(str, range(10))))
        return ImageLoader(source, TransformConfig(self.size, (0.5,) * 3, (0.3,) * 3, **look), self.machine.device)


@contextlib.contextmanager
def watched(kind: str) -> Iterator[Traffic]:
    """What goes on within it on a device of that kind."""
    if kind == "pretend":
        with pretend_device.counting() as traffic:
            yield traffic
        return
    traffic = Traffic()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield traffic
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for warning in said:
        if "synchronizing CUDA operation" in str(warning.message):
            traffic.wait(f"{Path(warning.filename).name}:{warning.lineno}")


def slope(kind: str, work: Callable[[int], Any]) -> Each:
    """Of ``work(batches)``: what one more batch costs."""
    found = []
    work(FEW)  # tables that are made once in a process
    for batches in (FEW, MORE):
        with watched(kind) as traffic:
            work(batches)
        found.append(traffic)
    few, more = found

    def each(key: str) -> float:
        return (getattr(more, key) - getattr(few, key)) / (MORE - FEW)

    waits = Counter(more.waits)
    waits.subtract(few.waits)
    return Each(
        *map(each, ("syncs", "up", "down", "operations")),
        {name: count / (MORE - FEW) for name, count in waits.items() if count},
    )


def training(bed: Bed, beside: str = "", augment: str = "none", **settings: Any) -> Each:
    """Of a step of the training loop; ``beside``: masks, bn_scale, group_norm or distillation."""

    def work(batches: int) -> None:
        asked = {"epochs": 1, "batch": bed.batch, "images": batches * bed.batch, "lr": 0.01, "selection": "last"}
        if beside == "distillation":
            asked["distill"] = 0.5
        loop = Loop(Training(**(asked | settings)), bed.feed(augment=augment), bed.machine, Tracker(False), 0)
        found = Trainer(bed.model(), loop, lambda model: {}, classes=10)
        if beside == "distillation":
            found.teacher = bed.model()
        elif beside == "masks":
            name, weight = next(iter(found.model.named_parameters()))
            found.masks = {name: torch.arange(weight.numel()).view_as(weight) % 2 == 0}
        elif beside:
            channels = trace_groups(found.model.eval(), torch.zeros(1, 3, bed.size, bed.size))
            found.penalty = sparsity_gradient(beside, found.model, channels, 1e-3)
        found.run()

    return slope(bed.kind, work)


def bare_training(bed: Bed, **look: Any) -> Each:
    """Of a step of the shortest loop: the same images, forward, backward, update."""

    def work(batches: int) -> None:
        device, feed = bed.machine.device, bed.feed(**look)
        model = bed.model().to(device).train()
        settings = Training(batch=bed.batch, lr=0.01)
        optimizer = optim.create_optimizer(optim.parameter_groups(model, settings), settings)
        for part in feed.batches(micro_batches(np.arange(batches * bed.batch), bed.batch), (0, 0)):
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(model(part.images), part.labels).backward()
            optimizer.step()

    return slope(bed.kind, work)


def scoring(bed: Bed, name: str, **options: Any) -> Each:
    """Of a micro-batch of a method's scoring."""
    kind = methods.find(name)

    def work(batches: int) -> None:
        model = bed.model().eval()
        channels = trace_groups(model, torch.zeros(1, 3, bed.size, bed.size))
        ids, at = np.arange(batches * bed.batch), bed.machine
        place = DistributedScoringContext(model.to(at.device), channels, bed.feed(), ids, at, Tracker(False), bed.batch)
        kind(kind.Options(**options)).score(place)

    return slope(bed.kind, work)


def evaluation(bed: Bed) -> Each:
    """Of an evaluation batch."""

    def work(batches: int) -> None:
        at = bed.machine
        ids = np.arange(batches * bed.batch)
        evaluate(bed.model().to(at.device), bed.feed(), bed.batch, at.comm, Tracker(False), ids=ids)

    return slope(bed.kind, work)


def bare_forward(bed: Bed, backward: bool = False) -> Each:
    """Of a batch that goes through the network, and back."""

    def work(batches: int) -> None:
        model, feed = bed.model().to(bed.machine.device).eval(), bed.feed()
        for part in feed.batches(micro_batches(np.arange(batches * bed.batch), bed.batch)):
            with torch.set_grad_enabled(backward):
                logits = model(part.images)
                if backward:
                    loss = functional.cross_entropy(logits, part.labels, reduction="sum")
                    torch.autograd.grad(loss, list(model.parameters()))

    return slope(bed.kind, work)

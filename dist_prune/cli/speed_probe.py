"""The speed of this machine at one recipe's network and images, from a few steps of a training and an evaluation."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dist_prune import methods
from dist_prune.config.recipe import Recipe
from dist_prune.config.training import Training
from dist_prune.distributed import watchdog
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.pipeline.context import RunContext
from dist_prune.training.evaluation import evaluate
from dist_prune.training.latency import synchronize
from dist_prune.training.loop import Loop
from dist_prune.training.tracking import Tracker
from dist_prune.training.trainer import Trainer

TIMED_S = 2.0  # seconds that one measurement may take; two images are timed in any case
STEPS = 3  # steps of a timed training; the fastest of two such epochs counts
BACKWARD = 3.0  # a training step takes about as long as three forward passes


@dataclass(frozen=True)
class Speed:
    """Measured times on one process.

    Attributes:
        begin_s: seconds from the start of a process to its first image: imports and the trace of the network.
        train_s: seconds per image of a training, with reading it.
        eval_s: seconds per image of an evaluation, with reading it.
        forward_s: seconds per image of a forward pass alone.
        train_images: number of training images.
        eval_images: number of evaluation images.
        score_passes: passes of the method over its calibration images, or None if that is not known beforehand.
        weight_bytes: size of the dense network's weights.
    """

    begin_s: float
    train_s: float
    eval_s: float
    forward_s: float
    train_images: int
    eval_images: int
    score_passes: int | None
    weight_bytes: int


def measure_speed(recipe: Recipe, jobs: int) -> Speed:
    """Time a few steps with random weights, on the device that a run would use; nothing is kept.

    Args:
        recipe: whose network and images are timed.
        jobs: tasks at a time, which share the cores.

    Raises:
        PruneError: the images are not here, or the network cannot be made.
    """
    imported = time.time() - watchdog.command_began()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, len(os.sched_getaffinity(0)) // jobs)))
    try:
        with tempfile.TemporaryDirectory() as folder:
            method = methods.build(recipe.method)
            environment = DistributedEnvironment(device, Communicator())
            context = RunContext(recipe, environment, Tracker(False), Path(folder), method)
            try:
                return _measure(context, imported)
            finally:
                context.images.close_loaders()
    finally:
        torch.set_num_threads(before)


def _measure(context: RunContext, imported: float) -> Speed:
    recipe, images, device = context.recipe, context.images, context.environment.device
    begun = time.monotonic()
    train, test = (len(images.splits[split].source.labels) for split in (True, False))
    model = context.networks.create().to(device)
    _ = context.networks.graph
    traced = time.monotonic() - begun
    example = images.example_input.to(device)
    forward_s = _least(lambda: _forward(model, example), device)
    many = max(2, int(TIMED_S / max(forward_s, 1e-9)))
    evaluated = np.arange(min(test, many, 4 * recipe.evaluate.batch))

    def evaluation() -> None:
        dense = model if context.task.compares else None
        evaluate(
            model, images.loader(False), recipe.evaluate.batch, Communicator(), Tracker(False), "time", evaluated,
            context.task, dense,
        )  # fmt: skip

    eval_s = _least(evaluation, device) / len(evaluated)
    settings = recipe.finetune if recipe.finetune.epochs else recipe.train
    needs = context.method.needs
    known = needs is not None and needs.forward is not None and needs.backward is not None
    return Speed(
        imported + 2 * traced,  # before the first stage, and in the stages
        _training(context, model, settings, max(2, int(many / BACKWARD / STEPS))),
        eval_s,
        forward_s,
        train,
        test,
        needs.forward + 2 * needs.backward if known else None,  # type: ignore[operator,union-attr]
        sum(tensor.nbytes for tensor in model.state_dict().values()),
    )


@torch.no_grad()
def _forward(model: nn.Module, example: torch.Tensor) -> None:
    model.eval()(example)


def _least(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of the faster one of two calls: the first one loads what the other uses."""
    times = []
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _training(context: RunContext, model: nn.Module, settings: Training, most: int) -> float:
    """Seconds per image of a training in steps of at most ``most`` images, compiled or not as it is written."""
    ids = context.images.training_split(settings)[0]
    batch = max(2, min(settings.batch, most, len(ids)))
    changes = {"epochs": 2, "warmup_epochs": 0, "batch": batch, "accumulate": 1, "compile": False, "sparsity": "none"}
    few = settings.model_copy(update={key: value for key, value in changes.items() if hasattr(settings, key)})
    loop = Loop(
        few, context.images.loader(True), context.environment, Tracker(False), context.recipe.seed, "time",
        ids[: STEPS * batch],
    )  # fmt: skip
    trainer = Trainer(model, loop, lambda _: {}, classes=len(context.images.classes), task=context.task)
    return 1 / max(line["images_per_s"] for line in trainer.run())

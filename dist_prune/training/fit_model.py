"""Train a whole network with gates on calibration images, with a loss of its own and checkpoints."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from dist_prune.config.training import Training
from dist_prune.data.loader import Batch, ImageLoader
from dist_prune.data.sampling import holdout_split
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.distributed.resumable_state import identity_of
from dist_prune.errors import PruneError
from dist_prune.tasks.base import Task
from dist_prune.training.checkpoints import CheckpointManager
from dist_prune.training.evaluation import evaluate
from dist_prune.training.loop import Loop
from dist_prune.training.sync_batchnorm import CrossRankBatchNorm
from dist_prune.training.tracking import Tracker
from dist_prune.training.trainer import Trainer

Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
Watch = Callable[[int], Mapping[str, float | Tensor] | None]


class TrainingHost(Protocol):
    """The members of a scoring context that a training on calibration images needs.

    Attributes:
        loader: training images.
        ids: (n,) the images to train on.
        environment: device and ranks.
        tracker: lines of progress and figures.
        seed: of order, augmentation and hold-out split.
        partial: folder of checkpoints that stay until the stage is finished, or None for no checkpoints.
        identity: the computation that checkpoints belong to.
        task: decides the figures on held-out images.
    """

    loader: ImageLoader
    ids: np.ndarray
    environment: DistributedEnvironment
    tracker: Tracker
    seed: int
    partial: Path | None
    identity: str
    task: Task


def fit_model(
    network: nn.Module, loss: Loss, settings: Training, host: TrainingHost, name: str, padding: int | None, watch: Watch
) -> list[dict[str, float]]:
    """Train all parameters and buffers of a network in place; batch norms use the batches of all ranks.

    Every rank calls it. Called again after an interruption it resumes at the step; after the end it loads the finished
    network.

    Args:
        network: bare, on any device.
        loss: (forward, images (n, C, H, W), labels (n,), ids (n,)) -> (n,) losses; ``forward`` is the network wrapped
            for the ranks.
        settings: epochs, optimizer, schedule, and which epoch is kept (the best on held-out images, or the last).
        host: images, ranks and the folder of checkpoints.
        name: of the training, its checkpoints and figures.
        padding: pixels around the images before they are cropped, or None for the recipe's.
        watch: called after each update with its number; the figures that it returns go to trackers (tensors as
            histograms).

    Returns:
        The figures of each epoch, see ``Trainer.run``.

    Raises:
        PreemptedError: on every rank, after one of them was asked to stop; the state is saved.
        PruneError: DeepSpeed shards the weights, or the loss is not finite.
    """
    environment = host.environment
    tracker = host.tracker
    seed = host.seed
    loader = host.loader
    if padding is not None:
        if not hasattr(loader, "transform"):
            raise PruneError(
                "the padding of training images is the data set's own in dist_prune.score: leave out the quirk "
                "padding_32, or write a recipe"
            )
        loader = replace(loader, transform=replace(loader.transform, padding=padding))
    if environment.zero_stage:
        raise PruneError("masks and weights that are learned together need whole weights: launch without DeepSpeed")
    train, heldout = holdout_split(host.ids, settings.holdout if settings.selection == "holdout" else 0.0, seed)

    def evaluate_heldout(model: nn.Module) -> Mapping[str, float]:
        batch = max(settings.batch, 100)
        if not len(heldout):
            return {}
        return evaluate(model, loader, batch, environment.comm, tracker, "score, held-out images", heldout, host.task)

    def losses(forward: nn.Module, batch: Batch) -> Tensor:
        with CrossRankBatchNorm(environment.comm) if environment.comm.world > 1 else contextlib.nullcontext():
            return loss(forward, batch.images, batch.labels, batch.ids)

    def log_figures(step: int) -> None:
        figures = watch(step) or {}
        numbers = {f"{name}/{key}": float(value) for key, value in figures.items() if not isinstance(value, Tensor)}
        if numbers:
            tracker.scalars(numbers, step)
        for key, value in figures.items():
            if isinstance(value, Tensor):
                tracker.histogram(f"{name}/{key}", value, step)

    loop = Loop(settings, loader, environment, tracker, seed, name, train)
    checkpoints = None
    if host.partial is not None:
        key = identity_of(host.identity, host.ids.tolist(), name, padding, settings)
        checkpoints = CheckpointManager(host.partial / name, key, settings.keep_checkpoints, tracker.info)
    return Trainer(network, loop, evaluate_heldout, "holdout", checkpoints, losses=losses, watch=log_figures).run()

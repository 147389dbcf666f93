"""Train a whole network with gates of its own on calibration images: its loss, its checkpoints, which epoch is kept."""

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
from dist_prune.training.checkpoints import CheckpointManager
from dist_prune.training.evaluation import evaluate
from dist_prune.training.loop import Loop
from dist_prune.training.sync_batchnorm import CrossRankBatchNorm
from dist_prune.training.tracking import Tracker
from dist_prune.training.trainer import Trainer

Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
Watch = Callable[[int], Mapping[str, float | Tensor] | None]


class TrainingHost(Protocol):
    """What a training on calibration images needs of a bench."""

    loader: ImageLoader
    ids: np.ndarray
    environment: DistributedEnvironment
    tracker: Tracker
    seed: int
    partial: Path | None
    identity: str


def fit_model(
    network: nn.Module, loss: Loss, settings: Training, at: TrainingHost, name: str, padding: int | None, watch: Watch
) -> list[dict[str, float]]:
    """Train ``network`` in place, in training mode, every parameter and buffer of it; batch norms see all ranks.

    Args:
        loss: ``loss(forward, images, labels, ids)`` gives (n,) losses; ``forward`` is the network, wrapped for ranks.
        settings: epochs, optimizer, schedule, and which epoch is kept (held-out images, or the last).
        at: images (training and held-out ones), ranks, and where checkpoints lie: they stay until the stage is done, so
            called again it goes on at the step, or takes the finished network.
        name: of the training, its checkpoints and figures.
        padding: of the crops of training images, in place of the recipe's.
        watch: called after each update; figures it returns go to trackers (tensors as histograms).
    """
    environment, tracker, seed, loader = at.environment, at.tracker, at.seed, at.loader
    if padding is not None:
        loader = replace(loader, transform=replace(loader.transform, padding=padding))
    if environment.zero_stage:
        raise PruneError("masks and weights that are learned together need whole weights: launch without DeepSpeed")
    train, held = holdout_split(at.ids, settings.holdout if settings.selection == "holdout" else 0.0, seed)

    def judge(model: nn.Module) -> Mapping[str, float]:
        batch = max(settings.batch, 100)
        return evaluate(model, loader, batch, environment.comm, tracker, "held out", held) if len(held) else {}

    def losses(forward: nn.Module, part: Batch) -> Tensor:
        with CrossRankBatchNorm(environment.comm) if environment.comm.world > 1 else contextlib.nullcontext():
            return loss(forward, part.images, part.labels, part.ids)

    def noted(step: int) -> None:
        found = watch(step) or {}
        numbers = {f"{name}/{key}": float(value) for key, value in found.items() if not isinstance(value, Tensor)}
        if numbers:
            tracker.scalars(numbers, step)
        for key, value in found.items():
            if isinstance(value, Tensor):
                tracker.histogram(f"{name}/{key}", value, step)

    loop = Loop(settings, loader, environment, tracker, seed, name, train)
    checkpoints = None
    if at.partial is not None:
        key = identity_of(at.identity, at.ids.tolist(), name, padding, settings)
        checkpoints = CheckpointManager(at.partial / name, key, settings.keep_checkpoints, tracker.info)
    return Trainer(network, loop, judge, "holdout", checkpoints, losses=losses, watch=noted).run()

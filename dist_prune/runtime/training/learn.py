"""Train a whole network with gates of its own on calibration images: its loss, its checkpoints, which epoch is kept."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from dist_prune.config.training import Training
from dist_prune.errors import PruneError
from dist_prune.runtime.data.dealing import held_out
from dist_prune.runtime.data.feed import Batch, Feed
from dist_prune.runtime.evaluation import evaluate
from dist_prune.runtime.machine import Machine
from dist_prune.runtime.resumable_state import identity_of
from dist_prune.runtime.tracking import Tracker
from dist_prune.runtime.training.loop import Loop
from dist_prune.runtime.training.norms import Together
from dist_prune.runtime.training.states import States
from dist_prune.runtime.training.train import Trainer

Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
Watch = Callable[[int], Mapping[str, float | Tensor] | None]


class Place(Protocol):
    """What a training on calibration images needs of a bench."""

    feed: Feed
    ids: np.ndarray
    machine: Machine
    tracker: Tracker
    seed: int
    partial: Path | None
    identity: str


def learn(
    network: nn.Module, loss: Loss, settings: Training, at: Place, name: str, padding: int | None, watch: Watch
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
    machine, tracker, seed, feed = at.machine, at.tracker, at.seed, at.feed
    if padding is not None:
        feed = replace(feed, look=replace(feed.look, padding=padding))
    if machine.zero:
        raise PruneError("masks and weights that are learned together need whole weights: launch without DeepSpeed")
    train, held = held_out(at.ids, settings.holdout if settings.selection == "holdout" else 0.0, seed)

    def judge(model: nn.Module) -> Mapping[str, float]:
        batch = max(settings.batch, 100)
        return evaluate(model, feed, batch, machine.ranks, tracker, "held out", held) if len(held) else {}

    def losses(forward: nn.Module, part: Batch) -> Tensor:
        with Together(machine.ranks) if machine.ranks.world > 1 else contextlib.nullcontext():
            return loss(forward, part.images, part.labels, part.ids)

    def noted(step: int) -> None:
        found = watch(step) or {}
        numbers = {f"{name}/{key}": float(value) for key, value in found.items() if not isinstance(value, Tensor)}
        if numbers:
            tracker.scalars(numbers, step)
        for key, value in found.items():
            if isinstance(value, Tensor):
                tracker.histogram(f"{name}/{key}", value, step)

    loop = Loop(settings, feed, machine, tracker, seed, name, train)
    states = None
    if at.partial is not None:
        key = identity_of(at.identity, at.ids.tolist(), name, padding, settings)
        states = States(at.partial / name, key, settings.keep_checkpoints, tracker.say)
    return Trainer(network, loop, judge, "holdout", states, losses=losses, watch=noted).run()

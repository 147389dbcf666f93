"""Tiny networks, trainings and scorings on a device that is not the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_prune.bench import Bench
from dist_prune.config.training import Training
from dist_prune.pruning.trial import sites_of
from dist_prune.runtime.collectives import Ranks
from dist_prune.runtime.data.feed import Feed, Look
from dist_prune.runtime.data.sources import open_source
from dist_prune.runtime.machine import Machine
from dist_prune.runtime.tracking import Tracker
from dist_prune.runtime.training.loop import Loop
from dist_prune.runtime.training.states import States
from dist_prune.runtime.training.train import Trainer
from tests import tiny


def machine_on(device: torch.device, ranks: Ranks | None = None) -> Machine:
    """A machine whose collectives stay on the CPU: what gloo ranks that share one GPU need."""
    return Machine(device, ranks or Ranks())


def bench_on(
    device: torch.device, model: nn.Module, ranks: Ranks | None = None, dtype: torch.dtype = torch.float64
) -> Bench:
    """As ``tiny.bench``, with network and images on a device."""
    look = Look(8, (0.3,), (0.4,))
    feed = Feed(open_source("digits", None, "", True), look, device, dtype=dtype)
    channels = sites_of(model, tiny.example()[:1].to(dtype))
    return Bench(
        model.to(device), channels, feed, np.arange(tiny.IMAGES), machine_on(device, ranks), Tracker(False),
        tiny.MICRO, 0, None, "test", 1,
    )  # fmt: skip


def trainer_on(
    device: torch.device, folder: Path | None = None, ranks: Ranks | None = None, augment: str = "crop_flip",
    dtype: torch.dtype = torch.float32, **settings: Any,
) -> Trainer:  # fmt: skip
    """A short training of a tiny network on 200 digits."""
    keys = Training(**{"epochs": 2, "batch": 32, "lr": 0.05, "images": 200, "selection": "last", **settings})
    look = Look(8, (0.3,), (0.4,), augment=augment)  # type: ignore[arg-type]
    feed = Feed(open_source("digits", None, "", True), look, device, dtype=dtype)
    loop = Loop(keys, feed, machine_on(device, ranks), Tracker(False), 0)
    states = States(folder, "me", say=lambda text: None) if folder else None
    return Trainer(tiny.network().to(dtype), loop, lambda model: {}, states=states, classes=10)


def weights_of(trainer: Trainer) -> torch.Tensor:
    """All weights of a trained network in one vector, float64 on the CPU."""
    return torch.cat([tensor.detach().double().cpu().reshape(-1) for tensor in trainer.model.state_dict().values()])

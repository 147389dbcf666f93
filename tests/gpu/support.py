"""Tiny networks, trainings and scorings on a device that is not the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_prune.config.training import Training
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training.checkpoints import CheckpointManager
from dist_prune.training.loop import Loop
from dist_prune.training.tracking import Tracker
from dist_prune.training.trainer import Trainer
from tests.support import tiny


def machine_on(device: torch.device, ranks: Communicator | None = None) -> DistributedEnvironment:
    """A machine whose collectives stay on the CPU: what gloo ranks that share one GPU need."""
    return DistributedEnvironment(device, ranks or Communicator())


def bench_on(
    device: torch.device, model: nn.Module, ranks: Communicator | None = None, dtype: torch.dtype = torch.float64
) -> DistributedScoringContext:
    """As ``tiny.bench``, with network and images on a device."""
    look = TransformConfig(8, (0.3,), (0.4,))
    feed = ImageLoader(open_source("digits", None, "", True), look, device, dtype=dtype)
    channels = trace_groups(model, tiny.example()[:1].to(dtype))
    return DistributedScoringContext(
        model.to(device), channels, feed, np.arange(tiny.IMAGES), machine_on(device, ranks), Tracker(False),
        tiny.MICRO, 0, None, "test", 1,
    )  # fmt: skip


def trainer_on(
    device: torch.device, folder: Path | None = None, ranks: Communicator | None = None, augment: str = "crop_flip",
    dtype: torch.dtype = torch.float32, **settings: Any,
) -> Trainer:  # fmt: skip
    """A short training of a tiny network on 200 digits."""
    keys = Training(**{"epochs": 2, "batch": 32, "lr": 0.05, "images": 200, "selection": "last", **settings})
    look = TransformConfig(8, (0.3,), (0.4,), augment=augment)  # type: ignore[arg-type]
    feed = ImageLoader(open_source("digits", None, "", True), look, device, dtype=dtype)
    loop = Loop(keys, feed, machine_on(device, ranks), Tracker(False), 0)
    states = CheckpointManager(folder, "me", say=lambda text: None) if folder else None
    return Trainer(tiny.network().to(dtype), loop, lambda model: {}, checkpoints=states, classes=10)


def weights_of(trainer: Trainer) -> torch.Tensor:
    """All weights of a trained network in one vector, float64 on the CPU."""
    return torch.cat([tensor.detach().double().cpu().reshape(-1) for tensor in trainer.model.state_dict().values()])

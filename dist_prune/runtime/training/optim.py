"""Optimizers and schedules by timm's names; which parameters decay, by module type."""

from collections.abc import Iterable
from typing import Any

import torch
from timm.optim._optim_factory import create_optimizer_v2, list_optimizers
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import nn

from dist_prune.errors import PruneError, unknown
from dist_prune.recipe import Training

NORMS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm,
)  # fmt: skip


def groups(model: nn.Module, settings: Training) -> list[dict[str, Any]]:
    """Parameter groups: norms and biases without weight decay (unless the recipe decays them too)."""
    plain, spared = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                spare = not settings.decay_norm_bias and (isinstance(module, NORMS) or name == "bias")
                (spared if spare else plain).append(parameter)
    found = [
        {"params": plain, "weight_decay": settings.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in found if group["params"]]


def optimizer(parameters: Iterable[nn.Parameter] | list[dict[str, Any]], settings: Training) -> torch.optim.Optimizer:
    """timm's optimizer of the recipe's name. ``sgd`` follows ``nesterov``; timm's own ``sgd`` always is Nesterov."""
    name = settings.optimizer
    if name == "sgd":
        name = "sgd" if settings.nesterov else "momentum"
    if name not in _names():
        raise PruneError(f"optimizer: {unknown('optimizer', name, _names())}")
    items: Any = list(parameters)
    try:
        return create_optimizer_v2(
            items, name, lr=settings.lr, weight_decay=settings.weight_decay, momentum=settings.momentum,
            **settings.optimizer_kwargs,
        )  # type: ignore[arg-type]  # fmt: skip
    except TypeError as error:
        raise PruneError(f"optimizer_kwargs: {name} does not take {settings.optimizer_kwargs}: {error}") from error


def _names() -> list[str]:
    return [str(name) for name in list_optimizers()]


class Schedule:
    """The learning rate as a function of the number of updates, by timm's schedulers: nothing to save."""

    def __init__(self, optimizer: torch.optim.Optimizer, settings: Training, updates_per_epoch: int):
        s = settings
        kinds = {"linear": "poly", "onecycle": "cosine"}
        warmup = s.warmup_epochs or (0.3 * s.epochs if s.schedule == "onecycle" else 0)
        self.updates = 0
        self._timm, _ = create_scheduler_v2(
            optimizer, sched=kinds.get(s.schedule, s.schedule), num_epochs=s.epochs, decay_epochs=s.step_size,
            decay_milestones=list(s.milestones), decay_rate=1.0 if s.schedule == "linear" else s.gamma,
            min_lr=s.min_lr, warmup_lr=s.warmup_lr, warmup_epochs=warmup,  # type: ignore[arg-type]
            step_on_epochs=False, updates_per_epoch=updates_per_epoch,
        )  # fmt: skip

    def at(self, updates: int) -> None:
        """Set the optimizer's learning rate for the update with this number, from 0."""
        if self._timm is not None:
            self._timm.step_update(updates)

"""Optimizers and schedules by timm's names; which parameters decay, by module type."""

from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

import torch
from timm.models._manipulate import group_with_matcher
from timm.optim._optim_factory import create_optimizer_v2, list_optimizers
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import nn

from dist_prune.config.training import Training
from dist_prune.errors import PruneError, unknown

NORMS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm,
)  # fmt: skip


def parameter_groups(model: nn.Module, settings: Training) -> list[dict[str, Any]]:
    """Parameter groups: norms and biases without weight decay (unless the recipe decays them too); learning rates
    scaled by layer and by name where the recipe says so (``lr_scale``, which timm's schedulers keep)."""
    spared = {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not settings.decay_norm_bias and (isinstance(module, NORMS) or name == "bias")
    }
    scales = _scales(model, settings)
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault((scales[name], parameter in spared), []).append(parameter)
    return [
        {"params": members, "weight_decay": 0.0 if spare else settings.weight_decay}
        | ({"lr_scale": scale} if scale != 1 else {})
        for (scale, spare), members in sorted(found.items(), key=lambda item: (item[0][1], item[0][0]))
    ]


def _scales(model: nn.Module, settings: Training) -> dict[str, float]:
    """Parameter name -> factor of its learning rate: layer_decay to the number of layers behind it, times lr_scales."""
    names = [name for name, _ in model.named_parameters()]
    scales = dict.fromkeys(names, 1.0)
    if settings.layer_decay is not None:
        if not hasattr(model, "group_matcher"):
            raise PruneError(
                f"layer_decay: {type(model).__name__} does not say which layers follow one another "
                "(timm's group_matcher); use lr_scales with globs of parameter names"
            )
        layers: Any = group_with_matcher(model.named_parameters(), model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
        last = max(layers.values())
        scales = {name: settings.layer_decay ** (last - layers[name]) for name in names}
    for glob in settings.lr_scales:
        if not any(fnmatch(name, glob) for name in names):
            raise PruneError(f"lr_scales: {unknown('parameter glob', glob, names)}")
    for name in names:
        scales[name] *= next((factor for glob, factor in settings.lr_scales.items() if fnmatch(name, glob)), 1.0)
    return scales


def create_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], settings: Training
) -> torch.optim.Optimizer:
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
    except (TypeError, ValueError, LookupError, RuntimeError, AssertionError) as error:
        raise PruneError(
            f"optimizer_kwargs: {name} does not take {settings.optimizer_kwargs} (with the recipe's lr, momentum and "
            f"weight_decay): {error}"
        ) from error


def check(model: nn.Module, settings: Training, name: str) -> None:
    """PruneError where the recipe's section ``name`` asks for an optimizer or for rates that ``model`` cannot have."""
    try:
        create_optimizer(parameter_groups(model, settings), settings)
    except PruneError as error:
        raise PruneError(f"{name}.{error}") from error


def _names() -> list[str]:
    return [str(name) for name in list_optimizers()]


class LearningRate:
    """The learning rate as a function of the number of updates, by timm's schedulers: nothing to save.

    ``onecycle`` climbs to the full rate and falls over what is left (Smith and Topin 2019, without momentum cycling);
    other warm-ups lie over the beginning of their schedule, as timm has it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: Training, updates_per_epoch: int):
        s = settings
        kinds = {"linear": "poly", "onecycle": "cosine"}
        warmup, epochs = s.warmup_epochs, float(s.epochs)
        if s.schedule == "onecycle":  # whole updates, so that one of them has the full rate
            total = s.epochs * updates_per_epoch
            warmup = min(round((warmup or 0.3 * s.epochs) * updates_per_epoch), total - 1) / updates_per_epoch
            epochs -= warmup
        self._optimizer = optimizer
        self._timm, _ = create_scheduler_v2(
            optimizer, sched=kinds.get(s.schedule, s.schedule), decay_epochs=s.step_size,
            num_epochs=epochs, warmup_prefix=s.schedule == "onecycle",  # type: ignore[arg-type]
            decay_milestones=list(s.milestones), decay_rate=1.0 if s.schedule == "linear" else s.gamma,
            min_lr=s.min_lr, warmup_lr=s.warmup_lr, warmup_epochs=warmup,  # type: ignore[arg-type]
            step_on_epochs=False, updates_per_epoch=updates_per_epoch,
        )  # fmt: skip
        if s.schedule == "multistep":  # timm looks one count ahead, which is right for epochs and early for updates
            self._timm.decay_t = [update + 1 for update in self._timm.decay_t]  # type: ignore[union-attr]

    def set_for(self, updates: int) -> None:
        """Set the optimizer's learning rate for the update with this number, from 0."""
        if self._timm is not None:
            self._timm.step_update(updates)

    @property
    def rate(self) -> float:
        """The learning rate of parameters that are not scaled."""
        return max(group["lr"] / (group.get("lr_scale", 1.0) or 1.0) for group in self._optimizer.param_groups)

"""Optimizers and learning-rate schedules by timm's names, and the parameter groups with weight decay."""

from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

import torch
from timm.models._manipulate import group_with_matcher
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import nn

from dist_prune.config.training import Training
from dist_prune.errors import PruneError, unknown

NORMS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm,
)  # fmt: skip


def parameter_groups(model: nn.Module, settings: Training) -> list[dict[str, Any]]:
    """Group a model's trainable parameters by weight decay and factor of the learning rate.

    Norms and biases have no weight decay unless the recipe's ``decay_norm_bias`` is set. The factor comes from
    ``layer_decay`` and ``lr_scales``.

    Args:
        model: the bare model.
        settings: the recipe's section.

    Returns:
        Groups with ``params``, ``weight_decay`` and, if it is not 1, ``lr_scale``, which timm's schedulers keep.

    Raises:
        PruneError: ``layer_decay`` for a network whose order of layers is unknown, or a glob that matches no name.
    """
    undecayed = {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not settings.decay_norm_bias and (isinstance(module, NORMS) or name == "bias")
    }
    scales = _scales(model, settings)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((scales[name], parameter in undecayed), []).append(parameter)
    return [
        {"params": params, "weight_decay": 0.0 if no_decay else settings.weight_decay}
        | ({"lr_scale": scale} if scale != 1 else {})
        for (scale, no_decay), params in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0]))
    ]


def _scales(model: nn.Module, settings: Training) -> dict[str, float]:
    """Parameter name -> factor of its learning rate: layer_decay ** (number of layers after it), times lr_scales."""
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
    """Create timm's optimizer of the recipe's name.

    ``sgd`` follows the recipe's ``nesterov``; timm's own ``sgd`` always uses Nesterov momentum.

    Args:
        parameters: parameters, or groups of them (see ``parameter_groups``).
        settings: the recipe's section.

    Raises:
        PruneError: unknown name, or arguments that the optimizer does not take.
    """
    from timm.optim._optim_factory import create_optimizer_v2  # imports torch's compiler, more than a second

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
    """Check that a section's optimizer and learning rates suit a model.

    Args:
        model: the bare model.
        settings: the recipe's section.
        name: of the section, for messages.

    Raises:
        PruneError: they do not.
    """
    try:
        groups = parameter_groups(model, settings)
        if not _always_fits(settings):
            create_optimizer(groups, settings)
    except PruneError as error:
        raise PruneError(f"{name}.{error}") from error


def _always_fits(settings: Training) -> bool:
    """Plain SGD, whose arguments have ranges of their own: creating one takes a second to import and cannot fail."""
    return (
        settings.optimizer == "sgd"
        and not settings.optimizer_kwargs
        and (settings.momentum > 0 or not settings.nesterov)
    )


def _names() -> list[str]:
    from timm.optim._optim_factory import list_optimizers

    return [str(name) for name in list_optimizers()]


class LearningRate:
    """The learning rate as a function of the number of updates, by timm's schedulers; it has no state to save.

    ``onecycle`` rises to the full rate and falls over the remaining updates (Smith and Topin 2019, without momentum
    cycling). Other warm-ups replace the beginning of their schedule, as in timm.

    Args:
        optimizer: its groups get the rates, times their ``lr_scale``.
        settings: ``schedule``, ``epochs`` and the other keys of the recipe's section; lengths are in epochs.
        updates_per_epoch: number of updates in an epoch.
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
        if s.schedule == "multistep":  # timm counts one ahead, which is right for epochs and too early for updates
            self._timm.decay_t = [update + 1 for update in self._timm.decay_t]  # type: ignore[union-attr]

    def set_for(self, updates: int) -> None:
        """Set the optimizer's learning rates.

        Args:
            updates: number of the next update since the beginning, from 0.
        """
        if self._timm is not None:
            self._timm.step_update(updates)

    @property
    def rate(self) -> float:
        """The present learning rate of parameters whose ``lr_scale`` is 1."""
        return max(group["lr"] / (group.get("lr_scale", 1.0) or 1.0) for group in self._optimizer.param_groups)

"""Acceleration of a training: memory format, synchronised batch norms, compilation; the parameters stay the same."""

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from dist_prune.config.training import Training
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.errors import PruneError
from dist_prune.training import deepspeed_engine


class AcceleratedModel:
    """A model changed for the duration of a training; parameters and buffers stay the same objects.

    Args:
        model: changed in place until ``restore``.
        settings: ``channels_last``, ``sync_bn`` and ``compile`` of the recipe's section.
        environment: the ranks.
    """

    def __init__(self, model: nn.Module, settings: Training, environment: DistributedEnvironment):
        self._model, self._settings = model, settings
        self._replaced: dict[str, nn.Module] = {}
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if settings.sync_bn and environment.comm.world > 1:
            before = dict(model.named_modules())
            convert_sync_batchnorm(model)
            after = dict(model.named_modules())
            self._replaced = {name: module for name, module in before.items() if after[name] is not module}

    def compile(self, forward: nn.Module) -> nn.Module:
        """Compile a module if the recipe says so.

        Args:
            forward: the model, already wrapped for the ranks.
        """
        mode = self._settings.compile
        if not mode:
            return forward
        return torch.compile(forward, mode=None if mode is True else mode)  # type: ignore[return-value]

    def restore(self) -> None:
        """Give the model its former batch norms and its contiguous memory format."""
        for name, module in self._replaced.items():
            parent, _, child = name.rpartition(".")
            setattr(self._model.get_submodule(parent), child, module)
        if self._settings.channels_last:
            self._model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def check(settings: Training, environment: DistributedEnvironment, name: str, deterministic: bool) -> None:
    """Check that this device and launch can do a training as the recipe describes it.

    Args:
        settings: the recipe's section.
        environment: device and ranks.
        name: of the section, for messages.
        deterministic: the recipe's ``cluster.deterministic``.

    Raises:
        PruneError: they cannot.
    """
    on_cpu = environment.device.type == "cpu"
    if settings.precision == "fp16" and on_cpu:
        raise PruneError(f"{name}.precision: fp16 is for GPUs; on a CPU use fp32 or bf16")
    if settings.sync_bn and on_cpu:
        raise PruneError(f"{name}.sync_bn: torch synchronises batch norms on GPUs only; leave it out on a CPU")
    if deterministic and settings.compile:
        raise PruneError(
            f"cluster.deterministic: {name}.compile chooses kernels by timing them, which can differ from run to run; "
            "switch one of the two off"
        )
    if settings.sparsity != "none" and environment.zero_stage:
        raise PruneError(f"{name}.sparsity: DeepSpeed shards the gradients it adds to; start without DeepSpeed")
    if environment.zero_stage:
        deepspeed_engine.check(settings, name)

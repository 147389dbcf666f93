"""Standardised convolutions that standardise over the inputs that are left, as they do after surgery."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.pruning.graph.standardised_convs import padded, standardise
from dist_prune.pruning.module_calls import first_input


@contextmanager
def gated_conv(model: nn.Module, layer: str, values: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Run ``model`` with a standardised convolution of the inputs that are left; the hook is removed afterwards.

    Args:
        model: the network.
        layer: module path of the convolution, which is not grouped.
        values: functions from the maps (n, C, H, W) to factors (n or 1, C), bool or floating point: one for each group
            that has channels there.
    """

    def replacement(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        maps = first_input(args, kwargs)
        factors = torch.ones(1, maps.shape[1], dtype=maps.dtype, device=maps.device)
        for value in values:
            rows = value(maps)
            wide = rows.view(*rows.shape, 1, 1)
            maps = maps * wide if rows.is_floating_point() else torch.where(wide, maps, 0)
            factors = factors * rows.to(maps.dtype)
        maps = padded(module, maps)
        parts = maps.split(len(maps) // len(factors))
        outputs = [
            functional.conv2d(
                part, standardise(module, row), module.bias, module.stride, module.padding, module.dilation
            )
            for part, row in zip(parts, factors, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    handle = model.get_submodule(layer).register_forward_hook(replacement, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()

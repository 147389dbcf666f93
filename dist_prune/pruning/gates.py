"""Switch channels off without cutting them: a gated-off channel acts as if it had been removed."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.pruning.channels import Channels
from dist_prune.pruning.combine import placed
from dist_prune.pruning.probe import first_input, with_first_input


@contextmanager
def masked(model: nn.Module, channels: Channels, group: str, stays: Tensor) -> Iterator[None]:
    """Run ``model`` as M networks at once, each with other channels of one group.

    The batch is M copies of the same images, one network's after the other's; network i keeps the channels where
    ``stays[i]`` is True. Channels are zeroed where they are consumed, as in ``gated``.

    Args:
        stays: (M, K) bool.
    """
    handles = []

    def keep(layer: str, index: tuple[int, ...], channel: tuple[int, ...]) -> Any:
        columns = torch.ones((len(stays), channels.layers[layer].width_in), dtype=torch.bool)
        columns[:, list(index)] = stays[:, list(channel)]
        columns = placed(columns, next(model.parameters()))
        last = channels.layers[layer].kind == "linear"

        def hook(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            first = first_input(args, kwargs)
            mask = columns.repeat_interleave(len(first) // len(columns), 0)
            shape = [len(first), *[1] * (first.dim() - 2)]
            shape.insert(len(shape) if last else 1, mask.shape[1])
            return with_first_input(args, kwargs, first * mask.view(shape))

        return hook

    try:
        for coupling in channels.group(group).couplings:
            layer = channels.layers[coupling.layer]
            if coupling.side == "in" and layer.kind in ("conv", "linear") and not layer.depthwise:
                hook = keep(coupling.layer, coupling.index, coupling.channel)
                handles.append(model.get_submodule(coupling.layer).register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gated(model: nn.Module, channels: Channels, off: Mapping[str, Iterable[int]]) -> Iterator[None]:
    """Run ``model`` as if the channels ``off[group]`` were gone.

    A channel is zeroed where it is consumed (the inputs of convolutions and linear layers), behind every batch norm,
    activation and addition on its way: so the batch norm's shift goes with it, as it does in surgery.
    """
    zeros: dict[str, set[int]] = {}
    for name, gone in off.items():
        chosen = list(gone)
        for coupling in channels.group(name).couplings:
            layer = channels.layers[coupling.layer]
            if coupling.side == "in" and layer.kind in ("conv", "linear") and not layer.depthwise:
                zeros.setdefault(coupling.layer, set()).update(coupling.positions(chosen))
    handles = []
    try:
        for layer, positions in zeros.items():
            index = placed(torch.tensor(sorted(positions), dtype=torch.long), next(model.parameters()))
            linear = channels.layers[layer].kind == "linear"

            def hook(
                _module: nn.Module, args: Any, kwargs: Any, index: Tensor = index, linear: bool = linear
            ) -> tuple[Any, Any]:
                first = first_input(args, kwargs)
                return with_first_input(args, kwargs, first.index_fill(first.dim() - 1 if linear else 1, index, 0))

            handles.append(model.get_submodule(layer).register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()

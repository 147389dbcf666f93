"""Switch channels off without cutting them: a gated-off channel acts as if it had been removed."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.pruning.channels import Channels


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
            index = torch.tensor(sorted(positions), dtype=torch.long)
            linear = channels.layers[layer].kind == "linear"

            def hook(
                _module: nn.Module, inputs: Any, index: Tensor = index, linear: bool = linear
            ) -> tuple[Tensor, ...]:
                first, *rest = inputs
                return (first.index_fill(first.dim() - 1 if linear else 1, index.to(first.device), 0), *rest)

            handles.append(model.get_submodule(layer).register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()

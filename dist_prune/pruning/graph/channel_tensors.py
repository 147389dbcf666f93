"""Values of a layer's positions as tensors of a group's channels, on the device where they are needed."""

import torch
from torch import Tensor

from dist_prune.pruning.graph.groups import Coupling


def to_device_of(table: Tensor, like: Tensor) -> Tensor:
    """``table`` on the device of ``like``; nobody waits for the copy."""
    return table.to(like.device, non_blocking=True)


def sum_by_channel(values: Tensor, coupling: Coupling, width: int) -> Tensor:
    """Values per position of a layer, (..., positions), summed per channel of the group coupled there: (..., C)."""
    out = values.new_zeros((*values.shape[:-1], width))
    channel, index = (to_device_of(torch.tensor(places), values) for places in (coupling.channel, coupling.index))
    return out.index_add_(-1, channel, values[..., index])

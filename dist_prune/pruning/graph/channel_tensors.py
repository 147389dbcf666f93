"""Values per position of a layer as values per channel of a group, on the device of the values."""

import torch
from torch import Tensor

from dist_prune.pruning.graph.groups import Coupling


def to_device_of(table: Tensor, like: Tensor) -> Tensor:
    """Copy ``table`` to the device of ``like`` without blocking."""
    return table.to(like.device, non_blocking=True)


def sum_by_channel(values: Tensor, coupling: Coupling, width: int) -> Tensor:
    """Sum values per position of a layer over the positions of each channel of a group.

    Args:
        values: (..., positions), one value per output (or input) position of the layer.
        coupling: the group's coupling to that side of the layer.
        width: channels of the group, C.

    Returns:
        (..., C), of the dtype and on the device of ``values``; positions of other groups are left out.
    """
    out = values.new_zeros((*values.shape[:-1], width))
    channel, index = (to_device_of(torch.tensor(numbers), values) for numbers in (coupling.channel, coupling.index))
    return out.index_add_(-1, channel, values[..., index])

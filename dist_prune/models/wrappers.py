"""The bare network inside wrappers."""

import copy

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The bare network inside DistributedDataParallel, DataParallel, torch.compile or a prepared model.

    Args:
        model: any network.

    Returns:
        The network, or a view of it: accelerate's mixed precision replaces ``forward`` by a function that a copy would
        share, so the view has the class's own ``forward``, and the same layers and tensors.
    """
    model = unwrap_module(model)
    if "_original_forward" not in vars(model):
        return model
    view = copy.copy(model)
    del view.__dict__["_original_forward"], view.__dict__["forward"]
    return view


def unwrap_module(model: nn.Module) -> nn.Module:
    """The module inside wrappers, with whatever ``forward`` it has.

    Args:
        model: any network.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model

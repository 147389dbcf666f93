"""The bare network inside wrappers, and the logits inside other outputs."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dist_prune.errors import PruneError


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


def logits_of(output: Any) -> Any:
    """The logits of a network's output.

    Args:
        output: a tensor, or a mapping or an object with ``logits`` (transformers), or a tuple whose first is a tensor.

    Returns:
        The logits; ``output`` itself if it has none.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    first = output[0] if isinstance(output, tuple | list) and output else None
    return first if isinstance(first, Tensor) else output


@contextmanager
def only_logits(model: nn.Module) -> Iterator[None]:
    """Let a network give its logits alone, for a while.

    Args:
        model: the bare network.
    """
    handle = model.register_forward_hook(lambda _module, _inputs, output: logits_of(output))
    try:
        yield
    finally:
        handle.remove()


def num_logits(output: Any) -> int:
    """The number of classes of a network's output.

    Args:
        output: of the network.

    Raises:
        PruneError: it is no tensor (n, classes).
    """
    logits = logits_of(output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        form = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise PruneError(
            f"the network gives {form}, and labels need logits (n, classes). Choose a method that needs no labels "
            "(dist-prune list methods), or give a network that ends in logits"
        )
    return logits.shape[1]

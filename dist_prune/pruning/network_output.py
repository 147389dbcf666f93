"""What a network returns: the tensors in it, and the logits of a classifier."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dist_prune.errors import PruneError


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Yield every tensor of a network's output in order.

    Args:
        output: a tensor; a tuple, list, mapping or data class of outputs; or an object with a tensor ``logits``.
    """
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_of(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from tensors_of(getattr(output, field.name))
    elif isinstance(logits := logits_of(output), Tensor):
        yield logits


def logits_of(output: Any) -> Any:
    """Return the logits of a classifier's output.

    Args:
        output: what a network returned. An object or a mapping with a tensor ``logits`` (transformers' ModelOutput,
            torchvision's outputs of Inception and GoogLeNet in training mode) is a classifier's output, and so is a
            tuple whose first is a tensor.

    Returns:
        The logits; any other output as it is.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) and isinstance(output, tuple | list) and output:
        found = output[0]
    return found if isinstance(found, Tensor) else output


@contextmanager
def only_logits(model: nn.Module) -> Iterator[None]:
    """Let a network return its logits alone during a ``with`` block; copies made meanwhile do so for good.

    Args:
        model: a bare network, whose calls return what ``logits_of`` reads.
    """
    handle = model.register_forward_hook(_logits)
    try:
        yield
    finally:
        handle.remove()


def _logits(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    return logits_of(output)


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

"""What a network returns: the tensors in it, their shapes, and the logits of a classifier."""

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.errors import PruneError
from dist_prune.pruning.shape_mode import ShapeMode

TABLES = (dict, OrderedDict)


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


def shaped_output(model: nn.Module, images: Tensor, training: bool = False) -> Any:
    """A network's output of which the shapes alone are wanted: its values may be missing.

    Convolutions, norms and matrix products are not computed (``ShapeMode``). A network that looks at values is run as
    it is.

    Args:
        model: a bare network; not changed.
        images: (n, C, H, W) on its device.
        training: the mode of the pass.

    Returns:
        What the network returns.

    Raises:
        Exception: any of the network's own forward pass.
    """
    devices = [images.device] if images.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        with suppress(Exception), unchanged(model), ShapeMode():  # its errors are those of the other pass as well
            return model.train(training)(torch.full_like(images, torch.nan))
        torch.manual_seed(0)
        with unchanged(model):
            return model.train(training)(images)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Give every module its buffers' values, its mode and its other attributes back after a ``with`` block."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    values = [(tensor, tensor.clone()) for tensor in model.buffers()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):  # an expanded tensor, or one of inference mode, cannot be written
                    tensor.copy_(value)


def copy_with(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a deep copy of a module with other tensors for its parameters and buffers.

    Args:
        model: not changed.
        change: gives the copy's tensor for one of the module's, detached. The tensor itself is then shared: the copy
            may replace its tensors, and must not write to them.
    """
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    made: dict[int, Any] = {}
    for key, tensor in tensors.items():
        new = change(tensor.detach())
        made[key] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    for module in model.modules():  # mostly empty tables of hooks, which deepcopy is slow to copy
        made |= {id(table): type(table)() for table in vars(module).values() if type(table) in TABLES and not table}
    return copy.deepcopy(model, made)


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

"""What a network returns: the tensors in it, their shapes, and the logits of a classifier."""

import copy
import dataclasses
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.errors import PruneError

NORMS: dict[type[nn.Module], int] = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}  # -> dimensions of their maps

TABLES = (dict, OrderedDict)
COMPILER = "torch._dynamo"
QUICK = 1.0  # seconds of a processor of a pass with values; the first one on the meta device takes 2


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


class ShapedNetwork:
    """A network of which the shapes of outputs alone are wanted; a pass in training mode follows one without a copy.

    Shapes on the meta device cost no time, once torch has imported its compiler and sympy for them (2 seconds). Before
    that a quick network is run with its values.

    Args:
        model: a bare network; not changed.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._trial: nn.Module | None = None
        self._quick = True  # unless a pass has shown otherwise

    def output(self, images: Tensor, training: bool = False) -> Any:
        """The output of one pass (see ``shaped_output``)."""
        devices = [images.device] if images.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            if self._quick and not _compiler_is_imported():
                start = time.thread_time()
                output = self._with_values(images, training)
                self._quick = time.thread_time() - start < QUICK
                return output
            try:
                trial, self._trial = self._trial or self._copy(), None  # a pass that fails may have changed it
                output = trial.train(training)(images.to("meta"))
            except Exception:  # also one that a run with values raises as well
                return self._with_values(images, training)
            self._trial = None if training else trial  # so may one in training mode
            return output

    def _with_values(self, images: Tensor, training: bool) -> Any:
        torch.manual_seed(0)
        with unchanged(self._model):
            return self._model.train(training)(images)

    def _copy(self) -> nn.Module:
        trial = copy_with(self._model, lambda tensor: tensor.to("meta"))
        for module in trial.modules():
            if type(module) in NORMS:
                module.forward = partial(_shape_of_norm, module)
        return trial


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


def _compiler_is_imported() -> bool:
    return COMPILER in sys.modules


def shaped_output(model: nn.Module, images: Tensor, training: bool = False) -> Any:
    """A network's output of which the shapes alone are wanted: its values may be missing.

    It is computed on torch's meta device, whose tensors have no values, so a convolution costs nothing. A network that
    does not run there (it looks at values, or holds tensors that are no parameters and no buffers) is run as it is.

    Args:
        model: a bare network; not changed.
        images: (n, C, H, W) on its device.
        training: the mode of the pass.

    Returns:
        What the network returns; its tensors may be on the meta device.

    Raises:
        Exception: any of the network's own forward pass.
    """
    return ShapedNetwork(model).output(images, training)


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


def _shape_of_norm(norm: Any, maps: Tensor) -> Tensor:
    """A batch norm's output without values, which torch computes by dozens of operations on the meta device."""
    single = norm.training and maps.numel() == norm.num_features
    if maps.dim() != NORMS[type(norm)] or maps.shape[1] != norm.num_features or single:
        raise ValueError(f"a batch norm of {norm.num_features} channels cannot take {tuple(maps.shape)}")
    return torch.empty_like(maps)


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

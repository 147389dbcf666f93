"""Forward hooks for a while: read or replace the raw output (or the input) of named layers while a network runs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.pruning.graph.groups import HookPoint
from dist_prune.pruning.module_calls import first_input, with_first_input


@contextmanager
def capture_outputs(
    model: nn.Module, points: Iterable[HookPoint], callback: Callable[[HookPoint, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call ``callback(point, tensor)`` each time the layer of a hook point runs; the hooks are removed afterwards.

    Args:
        model: the network that the hook points are of.
        points: hook points of side ``out`` (the callback gets the layer's raw output) or ``in`` (its first input).
        callback: if it returns a tensor, the network continues with that one in place of the one that it got.
    """
    handles = []
    try:
        for point in points:

            def after(_module: nn.Module, _inputs: Any, output: Tensor, point: HookPoint = point) -> Tensor | None:
                return callback(point, output)

            def before(_module: nn.Module, args: Any, kwargs: Any, point: HookPoint = point) -> tuple[Any, Any] | None:
                replacement = callback(point, first_input(args, kwargs))
                return None if replacement is None else with_first_input(args, kwargs, replacement)

            module = model.get_submodule(point.layer)
            if point.side == "in":
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def reproducible_kernels() -> Iterator[None]:
    """Run convolutions by cuDNN's deterministic algorithms in full float32, so that scores do not depend on the run.

    ``enabled`` has to be given: ``cudnn.flags`` switches cuDNN off otherwise, which is ten times slower.
    """
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield

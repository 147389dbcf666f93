"""Taps: read the raw output (or the input) of named layers while a network runs, and leave no trace behind."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.pruning.graph.groups import HookPoint
from dist_prune.pruning.module_calls import first_input, with_first_input


@contextmanager
def capture_outputs(
    model: nn.Module, points: Iterable[HookPoint], see: Callable[[HookPoint, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call ``see(site, output)`` each time a site's layer has run; the hooks are gone afterwards.

    A site with side "in" shows what enters its layer. Where ``see`` returns a tensor, the network goes on with that.
    """
    handles = []
    try:
        for point in points:

            def hook(_module: nn.Module, _inputs: Any, output: Tensor, point: HookPoint = point) -> Tensor | None:
                return see(point, output)

            def before(_module: nn.Module, args: Any, kwargs: Any, point: HookPoint = point) -> tuple[Any, Any] | None:
                first = see(point, first_input(args, kwargs))
                return None if first is None else with_first_input(args, kwargs, first)

            module = model.get_submodule(point.layer)
            if point.side == "in":
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def reproducible_kernels() -> Iterator[None]:
    """Convolutions on a GPU by cuDNN's deterministic algorithms, in full float32: scores do not depend on the run.

    ``enabled`` has to be named: ``cudnn.flags`` switches cuDNN off otherwise, which is ten times slower.
    """
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield

"""Names and shapes of a network's tensors without allocating them, within a budget of operations."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_prune.errors import PruneError

# Results of all operations while a network is built, drawing its weights included: timm's largest one (6.7 billion
# parameters) needs 49 billion values in 2,500 operations; no network needs many more than ten thousand operations.
DRAWS = {
    getattr(torch.ops.aten, name) for name in ("normal_", "uniform_", "fill_", "zero_", "erfinv_", "mul_", "clamp_")
}
MOST_VALUES, MOST_STEPS = 200_000_000_000, 400_000


class _Budget(TorchDispatchMode):
    """A dispatch mode that raises PruneError if the building of a network has absurd sizes or does not end."""

    def __init__(self) -> None:
        super().__init__()
        self.values = self.steps = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, for seconds, to keep it away from __torch_dispatch__

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # drawing weights changes no shape; torch's own way of it on the meta device imports its compiler
        out = args[0] if func.overloadpacket in DRAWS and args[0].is_meta else func(*args, **(kwargs or {}))
        self.steps += 1
        if isinstance(out, torch.Tensor):
            self.values += out.numel()
        if self.values > MOST_VALUES or self.steps > MOST_STEPS:
            raise PruneError("the network is absurdly large: see backbone.kwargs, the classes and the channels")
        return out


def meta_shapes(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]] | None:
    """Compute the shapes of a network's parameters and buffers on the meta device.

    Args:
        make: builds the network.

    Returns:
        Name -> shape; None if the constructor needs values of tensors, as in older versions of timm.

    Raises:
        PruneError: the network is absurdly large.
    """
    try:
        with torch.device("meta"), _Budget():
            model = make()
    except NotImplementedError:
        return None
    except RuntimeError as error:
        if "meta" in str(error).lower():
            return None
        raise
    return state_shapes(model)


def state_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter and buffer that is saved."""
    state: Mapping[str, torch.Tensor] = model.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}

"""The names and shapes of a network's tensors before any of it is allocated, within a budget."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_prune.errors import PruneError

# Results of all operations while a network is made, drawing its weights included: timm's largest (6.7 billion
# parameters) comes to 49 billion values in 2,500 operations; the most operations of any are some ten thousand.
MOST_VALUES, MOST_STEPS = 200_000_000_000, 400_000


class _Budget(TorchDispatchMode):
    """Ends the making of a network that asks for absurd sizes or never comes to an end."""

    def __init__(self) -> None:
        super().__init__()
        self.values = self.steps = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.steps += 1
        if isinstance(out, torch.Tensor):
            self.values += out.numel()
        if self.values > MOST_VALUES or self.steps > MOST_STEPS:
            raise PruneError("the network is absurdly large: see backbone.kwargs, the classes and the channels")
        return out


def meta_shapes(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]] | None:
    """Name -> shape of every parameter and buffer of the network that ``make`` builds; nothing is allocated.

    None where its constructor asks for values of tensors, which there are none of (older versions of timm).

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

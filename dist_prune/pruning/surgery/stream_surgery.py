"""Surgery on norms over channels and bare parameters. See graph/stream_layers.py."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.pruning.graph.stream_layers import norm_form, norm_width


def cut_norm(module: nn.Module, positions: Iterable[int]) -> None:
    """Remove channels from a norm over channels, in place; a group norm loses whole groups.

    Args:
        module: a norm for which ``norm_form`` is not None.
        positions: the channels that are removed.
    """
    width = norm_width(module)
    kept = _kept(width, positions)
    for key, parameter in module.named_parameters(recurse=False):
        setattr(module, key, _select(parameter, 0, kept))
    set_width(module, width, len(kept))


def set_width(module: Any, before: int, width: int) -> None:
    """Set the channel counts of a norm whose parameters have ``width`` channels now, and had ``before``."""
    if isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups if module.num_groups == 1 else width // (before // module.num_groups)
        module.num_channels = width
    else:
        module.normalized_shape = (width,)


def cut_parameter(model: nn.Module, name: str, axis: int, positions: Iterable[int]) -> None:
    """Remove channels from a bare parameter, in place.

    Args:
        model: the bare network.
        name: of the parameter.
        axis: of its channels.
        positions: the channels that are removed.
    """
    path, _, key = name.rpartition(".")
    parameter = model.get_parameter(name)
    owner: Any = model.get_submodule(path)
    setattr(owner, key, _select(parameter, axis, _kept(parameter.shape[axis], positions)))


def takes_shapes(module: nn.Module) -> bool:
    """Whether a module is a norm over channels, or may hold bare parameters: of torch's own only embeddings do."""
    own = not type(module).__module__.startswith("torch.nn.")
    return own or norm_form(module) is not None or isinstance(module, nn.Embedding)


def _kept(width: int, positions: Iterable[int]) -> list[int]:
    gone = set(positions)
    return [i for i in range(width) if i not in gone]


def _select(parameter: Tensor, axis: int, kept: list[int]) -> nn.Parameter:
    index = torch.tensor(kept, device=parameter.device)
    return nn.Parameter(parameter.data.index_select(axis, index), parameter.requires_grad)

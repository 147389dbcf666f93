"""New weights for named layers, from (seed, names) alone: never from torch's global random state."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dist_prune.pruning.rng import seeded_generator


@torch.no_grad()
def reinitialise(model: nn.Module, names: Iterable[str], seed: int) -> None:
    """Give the linear layers and norms of that name the weights of a new network, in place (torch's initialisation:
    uniform within 1 / sqrt(inputs); norms 1 and 0)."""
    for name in names:
        module: Any = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            bound, generator = 1 / math.sqrt(module.in_features), seeded_generator(seed, "renew", name)
            for parameter in module.parameters():
                fresh = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_((2 * fresh - 1) * bound)
        else:
            module.reset_parameters()  # a norm: no randomness

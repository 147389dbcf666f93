"""New weights for named layers. They depend on the seed and the names, never on torch's global random state."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dist_prune.pruning.rng import seeded_generator


@torch.no_grad()
def reinitialise(model: nn.Module, names: Iterable[str], seed: int) -> None:
    """Reset linear layers and norms to initial weights, in place.

    Linear layers get torch's initialisation, uniform within 1 / sqrt(inputs); norms get scale 1 and shift 0.

    Args:
        model: the network.
        names: module paths of linear layers and norms.
        seed: the run's seed; each layer's numbers are drawn from (seed, name).
    """
    for name in names:
        module: Any = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            bound, generator = 1 / math.sqrt(module.in_features), seeded_generator(seed, "renew", name)
            for parameter in module.parameters():
                fresh = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_((2 * fresh - 1) * bound)
        else:
            module.reset_parameters()  # a norm: no randomness

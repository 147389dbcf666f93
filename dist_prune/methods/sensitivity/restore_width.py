"""Weights of a pruned network in the shapes of the dense one, so that a dense plan can prune them again."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.weight_blocks import remaining_positions


def restore_width(
    dense: Mapping[str, Tensor], small: Mapping[str, Tensor], graph: DependencyGraph, plan: Plan
) -> dict[str, Tensor]:
    """Write the weights of a pruned network into a dense state dict.

    Entries that the plan removed keep the values of ``dense``. Pruning the result by ``plan`` gives ``small``.

    Args:
        dense: state dict in dense shapes.
        small: state dict of the pruned network, after training.
        graph: of the dense network.
        plan: of the pruned network, in dense coordinates.

    Returns:
        A new state dict in dense shapes, on the CPU.
    """
    positions = remaining_positions(graph, plan.removed)
    restored = {}
    for name, old in dense.items():
        new, owner = small[name].detach().cpu(), name.rpartition(".")[0]
        if new.shape == old.shape:
            restored[name] = new.clone()
            continue
        restored[name] = wide = old.detach().cpu().clone()
        rows = torch.tensor(positions[owner, "out"])
        if new.dim() > 1 and new.shape[1] != wide.shape[1]:
            wide[rows[:, None], torch.tensor(positions[owner, "in"])] = new
        else:
            wide[rows] = new
    return restored

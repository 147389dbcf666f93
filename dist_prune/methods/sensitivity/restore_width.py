"""Weights of a cut network back in the shapes of the dense one, where the dense plan can cut them again."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.weight_blocks import remaining_positions


def restore_width(
    dense: Mapping[str, Tensor], small: Mapping[str, Tensor], graph: DependencyGraph, plan: Plan
) -> dict[str, Tensor]:
    """The dense state dict with every entry that ``plan`` left replaced by the cut network's, on the CPU.

    What the plan removed keeps the values of ``dense``. Cutting ``plan`` out of the result gives ``small``.

    Args:
        dense: state dict in dense shapes.
        small: state dict of the network that the plan left, its weights trained since.
        graph: of the dense network.
        plan: in dense coordinates.
    """
    places, out = remaining_positions(graph, plan.removed), {}
    for name, old in dense.items():
        new, owner = small[name].detach().cpu(), name.rpartition(".")[0]
        if new.shape == old.shape:
            out[name] = new.clone()
            continue
        out[name] = whole = old.detach().cpu().clone()
        rows = torch.tensor(places[owner, "out"])
        if new.dim() > 1 and new.shape[1] != whole.shape[1]:
            whole[rows[:, None], torch.tensor(places[owner, "in"])] = new
        else:
            whole[rows] = new
    return out

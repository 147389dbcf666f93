"""New scales and shifts for norms over channels that lost channels, in closed form from calibration images.

A norm over fewer channels has another mean and another variance. For the input x of a norm in the network that was
pruned, y is its output there, and z is x normalised over the channels that are left. Over all images and places

    scale = cov(z, y) / var(z),  shift = mean(y) - scale mean(z)      with a shift
    scale = mean(z y) / mean(z^2)                                     without one

are the least squares of y - (scale z + shift), channel by channel. Sums are taken per micro-batch and added in order,
so every number of ranks gives the same bits.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.distributed.communicator import Communicator
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.graph.stream_layers import norm_form
from dist_prune.pruning.hooks.gated_norms import normalise
from dist_prune.pruning.module_calls import first_input
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.weight_blocks import remaining_positions
from dist_prune.scoring.ordered_sums import OrderedSums

SUMS = 5  # per channel: count, z, y, z^2, z y


def refit_norms(
    dense: nn.Module, small: nn.Module, graph: DependencyGraph, plan: Plan, loader: Any, ids: np.ndarray,
    micro_batch: int, comm: Communicator,
) -> list[str]:  # fmt: skip
    """Refit every norm over channels that lost channels, in place; a collective.

    Args:
        dense: the network that was pruned; not changed.
        small: what the plan leaves of it, on the same device.
        graph: of ``dense``.
        plan: in coordinates of ``dense``.
        loader: the images; labels are not read.
        ids: (n,) their ids, ascending.
        micro_batch: images that go through the network together.
        comm: all ranks.

    Returns:
        Module paths of the norms that were refitted, in module order; norms without a scale are left out.

    Raises:
        PreemptedError: on every rank, if one of them was asked to stop.
    """
    left, gone = remaining_positions(graph, plan.removed), graph.layers_gone(plan.counts)
    names = [
        name
        for name, layer in graph.layers.items()
        if name not in gone and layer.kind == "layer norm" and layer.bias
        if len(left[name, "out"]) < layer.width_out
    ]
    if not names:
        return []
    device = next(dense.parameters()).device
    kept = {name: torch.tensor(left[name, "out"], device=device) for name in names}
    sums = OrderedSums({name: (SUMS, len(kept[name])) for name in names}, ids, micro_batch, device)
    handles = []
    for name in names:

        def note(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            # a norm may run twice
            sums.add(name, _sums(module, small.get_submodule(name), first_input(args, kwargs), kept[name]))

        handles.append(dense.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True))
    try:
        totals = sums.run(dense, loader, comm, "while norms were refitted")
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        _fit(small.get_submodule(name), totals[name])
    return names


def _sums(norm: Any, small: Any, maps: Tensor, kept: Tensor) -> Tensor:
    """(SUMS, kept channels) float64 of one micro-batch."""
    axis = norm_form(norm).axis  # type: ignore[union-attr]
    x = maps.movedim(axis, -1).double()
    ones = torch.ones((), dtype=x.dtype, device=x.device)
    y = normalise(norm, x, ones) * norm.weight.double()
    if getattr(norm, "bias", None) is not None:
        y = y + norm.bias.double()
    y = y[..., kept].flatten(0, -2)
    z = normalise(small, x[..., kept], ones).flatten(0, -2)
    count = torch.full((len(kept),), float(len(z)), dtype=x.dtype, device=x.device)
    return torch.stack([count, z.sum(0), y.sum(0), z.square().sum(0), (z * y).sum(0)])


@torch.no_grad()
def _fit(norm: Any, total: Tensor) -> None:
    """Set scale and shift by the sums over all images; a channel whose z does not vary keeps its scale."""
    count, z, y, zz, zy = total
    shifted = getattr(norm, "bias", None) is not None
    spread = zz / count - (z / count).square() if shifted else zz / count
    together = zy / count - z * y / count.square() if shifted else zy / count
    old = norm.weight.double()
    scale = torch.where(spread > 1e-12, together / spread.clamp(min=1e-12), old)
    norm.weight.copy_(scale)
    if shifted:
        norm.bias.copy_((y - scale * z) / count)

"""Masks of a plan's blocks: what stays exactly zero through training, and which channels are gone with their blocks."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.weight_blocks import WeightBlocks, remaining_positions


def block_mask(blocks: WeightBlocks, width_out: int, width_in: int) -> Tensor:
    """(out, in) bool, False where a block is cut."""
    mask = torch.ones((width_out, width_in), dtype=torch.bool)
    for rows, cut in zip(blocks.rows, blocks.cut, strict=True):
        columns = [j for group in cut for j in blocks.columns[group]]
        mask[torch.tensor(rows)[:, None], torch.tensor(columns, dtype=torch.long)[None]] = False
    return mask


def weight_masks(plan: Plan, graph: DependencyGraph, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter name -> bool mask, False where the small network's weight is held at zero.

    Args:
        graph: of the dense network.
        weights: state dict of the network that the plan left: the masks get its shapes.
    """
    if not plan.blocks:
        return {}
    stays, out = remaining_positions(graph, plan.removed), {}
    for name, blocks in plan.blocks.items():
        layer = _layer(graph, name)
        mask = block_mask(blocks, layer.width_out, layer.width_in)
        mask = mask[stays[name, "out"]][:, stays[name, "in"]]
        shape = weights[f"{name}.weight"].shape
        out[f"{name}.weight"] = mask.view(*mask.shape, *[1] * (len(shape) - 2)).expand(shape).contiguous()
    return out


@torch.no_grad()
def zero_blocks(model: nn.Module, graph: DependencyGraph, plan: Plan) -> None:
    """Set the plan's blocks to zero in a dense ``model``, in place."""
    for name, blocks in plan.blocks.items():
        layer = _layer(graph, name)
        weight = model.get_parameter(f"{name}.weight")
        mask = block_mask(blocks, layer.width_out, layer.width_in).to(weight.device)
        weight.masked_fill_(~mask.view(*mask.shape, *[1] * (weight.dim() - 2)), 0)


def weights_left(plan: Plan, graph: DependencyGraph) -> dict[str, tuple[int, int]]:
    """Convolution or linear layer -> (weights that are neither removed nor masked, weights of the dense layer)."""
    stays, out = remaining_positions(graph, plan.removed), {}
    for name, layer in graph.layers.items():
        if layer.kind not in ("conv", "linear"):
            continue
        rows, columns = stays[name, "out"], stays[name, "in"]
        per_row = 1 if layer.depthwise else layer.width_in // layer.groups
        kept = len(rows) * (per_row if layer.groups > 1 else len(columns))
        if name in plan.blocks:
            kept = int(block_mask(plan.blocks[name], layer.width_out, layer.width_in)[rows][:, columns].sum())
        out[name] = (kept * layer.kernel, layer.width_out * per_row * layer.kernel)
    return out


def mask_violations(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> list[str]:
    """The masked weights that are not exactly zero where they should be."""
    return [name for name, mask in masks.items() if bool((weights[name].cpu() * ~mask != 0).any())]


def _layer(graph: DependencyGraph, name: str):
    layer = graph.layers.get(name)
    if layer is None or layer.kind not in ("conv", "linear") or layer.groups != 1:
        raise PruneError(f"the plan cuts blocks of {name!r}, which is no plain convolution or linear layer here")
    return layer

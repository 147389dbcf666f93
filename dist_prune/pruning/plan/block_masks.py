"""Masks of a plan's weight blocks: the weights that stay exactly zero through training."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import DependencyGraph, Layer
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.weight_blocks import WeightBlocks, remaining_positions


def block_mask(blocks: WeightBlocks, width_out: int, width_in: int) -> Tensor:
    """Make the mask of one layer's blocks.

    Args:
        blocks: the layer's blocks.
        width_out: output channels of the layer, in the coordinates of ``blocks``.
        width_in: input channels.

    Returns:
        (out, in) bool, False where a block is cut.
    """
    mask = torch.ones((width_out, width_in), dtype=torch.bool)
    for rows, cut in zip(blocks.rows, blocks.cut, strict=True):
        columns = [j for group in cut for j in blocks.columns[group]]
        mask[torch.tensor(rows)[:, None], torch.tensor(columns, dtype=torch.long)[None]] = False
    return mask


def weight_masks(plan: Plan, graph: DependencyGraph, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make the masks of the pruned network's weights.

    Args:
        plan: a plan in coordinates of the dense network.
        graph: dependency graph of the dense network.
        weights: state dict of the pruned network; the masks get its shapes.

    Returns:
        Parameter name -> bool mask, False where the weight stays zero; only layers with blocks.

    Raises:
        PruneError: the plan cuts blocks of a layer that is no plain convolution or linear layer.
    """
    if not plan.blocks:
        return {}
    positions = remaining_positions(graph, plan.removed)
    masks = {}
    for name, blocks in plan.blocks.items():
        layer = _block_layer(graph, name)
        mask = block_mask(blocks, layer.width_out, layer.width_in)
        mask = mask[positions[name, "out"]][:, positions[name, "in"]]
        shape = weights[f"{name}.weight"].shape
        masks[f"{name}.weight"] = mask.view(*mask.shape, *[1] * (len(shape) - 2)).expand(shape).contiguous()
    return masks


@torch.no_grad()
def zero_blocks(model: nn.Module, graph: DependencyGraph, plan: Plan) -> None:
    """Set the weights of the plan's blocks to zero in a dense ``model``, in place."""
    for name, blocks in plan.blocks.items():
        layer = _block_layer(graph, name)
        weight = model.get_parameter(f"{name}.weight")
        mask = block_mask(blocks, layer.width_out, layer.width_in).to(weight.device)
        weight.masked_fill_(~mask.view(*mask.shape, *[1] * (weight.dim() - 2)), 0)


def weights_left(plan: Plan, graph: DependencyGraph) -> dict[str, tuple[int, int]]:
    """Count weights of convolutions and linear layers after pruning.

    Args:
        plan: a plan in coordinates of the dense network.
        graph: dependency graph of the dense network.

    Returns:
        Layer -> (weights that are neither removed nor masked, weights of the dense layer).
    """
    positions = remaining_positions(graph, plan.removed)
    counts = {}
    for name, layer in graph.layers.items():
        if layer.kind not in ("conv", "linear"):
            continue
        rows, columns = positions[name, "out"], positions[name, "in"]
        per_row = 1 if layer.depthwise else layer.width_in // layer.groups
        kept = len(rows) * (per_row if layer.groups > 1 else len(columns))
        if name in plan.blocks:
            kept = int(block_mask(plan.blocks[name], layer.width_out, layer.width_in)[rows][:, columns].sum())
        counts[name] = (kept * layer.kernel, layer.width_out * per_row * layer.kernel)
    return counts


def mask_violations(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> list[str]:
    """Return the names of masked weights that are not exactly zero where their mask is False."""
    return [name for name, mask in masks.items() if bool((weights[name].cpu() * ~mask != 0).any())]


def _block_layer(graph: DependencyGraph, name: str) -> Layer:
    layer = graph.layers.get(name)
    if layer is None or layer.kind not in ("conv", "linear") or layer.groups != 1 or layer.transposed:
        raise PruneError(f"the plan cuts blocks of {name!r}, which is no plain convolution or linear layer here")
    return layer

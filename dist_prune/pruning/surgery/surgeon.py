"""Apply a plan to a traced network, by torch-pruning. Works on bare models only.

Wrap a model in DistributedDataParallel, compile it and make its optimizer after surgery.
"""

import copy
from collections.abc import Mapping

import torch_pruning as tp
from torch import Tensor, nn

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.called_layers import RowsView, call_layers_of_units
from dist_prune.pruning.graph.groups import DependencyGraph, Layer
from dist_prune.pruning.plan.block_masks import zero_blocks
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery import head_surgery, stream_surgery
from dist_prune.pruning.surgery.depth_surgery import remove_blocks


def apply_plan(model: nn.Module, graph: DependencyGraph, plan: Plan) -> None:
    """Set the plan's blocks to zero and cut its channels out of ``model``, in place.

    Args:
        model: the bare dense network.
        graph: dependency graph of that network.
        plan: a plan in coordinates of that network.

    Raises:
        PruneError: the plan belongs to another network.
    """
    if {g.name: g.width for g in graph.groups} != dict(plan.widths):
        raise PruneError(
            "the plan belongs to another network: its groups or their dense widths differ from this one's. A trace "
            "with other units or streams than the plan's finds other groups"
        )
    graph.check_removable(plan.removed, plan.blocks_removed)
    call_layers_of_units(model, plan.widths)
    zero_blocks(model, graph, plan)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    cuts: dict[tuple[str, str], set[int]] = {}
    for name, channels in plan.removed.items():
        for coupling in graph.group(name).couplings:
            cuts.setdefault((coupling.layer, coupling.side), set()).update(coupling.positions(channels))
    for (name, side), positions in cuts.items():
        layer = graph.layers[name]
        if layer.kind == "parameter":
            stream_surgery.cut_parameter(model, name, layer.axis, positions)
        else:
            _cut_layer(model.get_submodule(name), layer, side, sorted(positions))
    head_surgery.update_counts(model)
    remove_blocks(model, plan.blocks_removed)
    left = dict(model.named_parameters())
    for name in frozen:  # torch-pruning makes new parameters, which all want gradients
        if name in left:
            left[name].requires_grad_(False)


def prune_tensors_like(
    model: nn.Module, graph: DependencyGraph, plan: Plan, tables: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Cut tensors that are shaped and named as parameters and buffers of ``model``, as ``apply_plan`` cuts the weights.

    For optimizer states and averaged weights: the operation that cuts the weights cuts them as well.

    Args:
        model: the bare dense network; not changed.
        graph: dependency graph of that network.
        plan: a plan in coordinates of that network.
        tables: name of a parameter or buffer -> tensor of its shape.

    Returns:
        The names of ``tables`` that are left -> tensors of the pruned shapes.
    """
    other = copy.deepcopy(model)
    for name, tensor in tables.items():
        path, _, key = name.rpartition(".")
        owner, copied = other.get_submodule(path), tensor.detach().clone()
        if key in owner._parameters:
            owner._parameters[key] = nn.Parameter(copied)
        else:
            owner._buffers[key] = copied
    apply_plan(other, graph, plan)
    pruned = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    return {name: pruned[name].detach() for name in tables if name in pruned}


def _cut_layer(module: nn.Module, layer: Layer, side: str, positions: list[int]) -> None:
    if isinstance(module, RowsView):
        module.cut(side, positions)
    elif layer.kind == "norm":
        tp.prune_batchnorm_out_channels(module, positions)
    elif layer.kind == "conv" and layer.depthwise:
        tp.prune_depthwise_conv_out_channels(module, positions)
    elif layer.kind == "layer norm":
        stream_surgery.cut_norm(module, positions)
    elif layer.kind == "table":
        head_surgery.cut_table(module, positions)
    elif layer.kind == "conv" and layer.groups > 1:
        head_surgery.cut_grouped(module, side, positions)  # type: ignore[arg-type]
    elif layer.kind == "conv":
        (tp.prune_conv_out_channels if side == "out" else tp.prune_conv_in_channels)(module, positions)
    elif layer.kind == "linear":
        (tp.prune_linear_out_channels if side == "out" else tp.prune_linear_in_channels)(module, positions)
    if layer.kind == "conv" and side == "out" and getattr(module, "gain", None) is not None:
        stream_surgery.cut_parameter(module, "gain", 0, positions)  # of a standardised convolution

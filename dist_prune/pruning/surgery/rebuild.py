"""Rebuild a pruned network from its weights and its plan, without tracing: the weights give the layers' widths."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.called_layers import LinearView, RowsView, call_layers_of_units
from dist_prune.pruning.graph.stream_layers import norm_form, norm_width
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.surgery import head_surgery, stream_surgery
from dist_prune.pruning.surgery.depth_surgery import places, remove_blocks


def rebuild(model: nn.Module, plan: Plan, weights: Mapping[str, Tensor]) -> nn.Module:
    """Give a new dense ``model`` the shapes of ``weights`` and load them strictly, in place.

    Args:
        model: as the backbone's factory makes it, with the dense widths.
        plan: the plan that was applied; its dense widths are compared with the model's.
        weights: state dict of the pruned network.

    Returns:
        ``model``.

    Raises:
        PruneError: the model does not fit the plan, or the weights do not fit the model.
    """
    call_layers_of_units(model, plan.widths)
    modules, widths = dict(model.named_modules()), {}
    gone = places(model)  # of a network that starts at a bundle
    for name, width in plan.widths.items():
        if name.startswith(gone):
            continue
        layer = modules.get(name)
        dense = widths[name] = getattr(layer, "out_channels", getattr(layer, "out_features", None))
        if dense is None or dense % width:  # a unit is several outputs
            raise PruneError(f"this network does not fit the plan: {name!r} has width {dense}, the plan says {width}")
    remove_blocks(model, plan.blocks_removed)
    left = dict(model.named_modules())
    counts = {name: count for name, count in plan.groups_kept.items() if name in left}
    for name, count in counts.items():
        each = widths[name] // plan.widths[name]
        weight = weights.get(f"{name}.weight")
        channels = count * each if weight is None else _outputs_of(modules[name], weight)
        if channels != count * each:
            raise PruneError(
                f"the weights do not fit the plan: {name!r} has {channels} channels, the plan leaves {count * each}"
            )
    for name in plan.removed:
        parent = modules.get(name.rpartition(".")[0])
        if name.endswith(".qkv") and hasattr(parent, "num_heads") and not head_surgery.has_heads(parent):
            raise PruneError(
                f"{name}: the plan removes heads, and this version of timm has a {type(parent).__qualname__} there "
                "that is not known here; load it with the timm version that the bundle names"
            )
    for name, module in model.named_modules():
        _take_shapes(module, name, weights)
        if isinstance(module, RowsView) and name in plan.widths and name.endswith(".qk"):
            owner: Any = modules[name.rpartition(".")[0]]
            owner.query_key_rows = counts[name] * (widths[name] // plan.widths[name])
    for name, count in counts.items():
        layer, wanted = modules[name], count * (widths[name] // plan.widths[name])
        if isinstance(layer, LinearView) and layer.out_features != wanted:
            raise PruneError(
                f"the weights do not fit the plan: {name!r} has {layer.out_features} channels, the plan leaves {wanted}"
            )
    head_surgery.update_counts(model)
    missing, extra = model.load_state_dict(dict(weights), strict=False)
    if missing or extra:
        raise PruneError(f"weights do not fit the network: missing {missing[:3]}, not expected {extra[:3]}")
    return model


def _has_view(module: nn.Module) -> bool:
    """Whether a layer of the module has the module's parameters, and takes their shapes by itself."""
    return any(isinstance(child, LinearView) for child in module.children())


def _outputs_of(layer: nn.Module, weight: Tensor) -> int:
    """Output channels of a layer with this weight; those of a transposed convolution lie on the second axis."""
    if not isinstance(layer, nn.ConvTranspose2d):
        return len(weight)
    kept = len(weight) // (layer.in_channels // layer.groups) if layer.groups > 1 else 1
    return weight.shape[1] * kept


def _take_shapes(module: nn.Module, name: str, weights: Mapping[str, Tensor]) -> None:
    prefix = f"{name}." if name else ""
    changed = False
    before = norm_width(module) if norm_form(module) is not None else 0
    tables: list[Any] = [module._parameters, module._buffers]
    for table in tables:
        for key, old in table.items():
            new = weights.get(prefix + key)
            if old is None or new is None or old.shape == new.shape:
                continue
            if old.dim() != new.dim():
                raise PruneError(f"{prefix}{key}: shape {tuple(new.shape)} cannot replace {tuple(old.shape)}")
            empty = torch.empty(new.shape, dtype=old.dtype, device=old.device)
            table[key] = nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
            changed = True
    if not changed:
        return
    weight: Any = module._parameters.get("weight")
    if isinstance(module, nn.ConvTranspose2d):
        ins, each = module.in_channels // module.groups, module.out_channels // module.groups
        module.groups = weight.shape[0] // ins if module.groups > 1 else 1  # it loses whole groups
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.Conv2d):
        depthwise = module.groups == module.in_channels == module.out_channels > 1
        each = module.out_channels // module.groups  # grouped convolutions lose whole groups
        module.out_channels = weight.shape[0]
        module.groups = weight.shape[0] if depthwise else weight.shape[0] // each if module.groups > 1 else 1
        module.in_channels = weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = len(weights[f"{prefix}running_mean"])
    elif before:
        stream_surgery.set_width(module, before, len(weight))
    elif not _has_view(module) and not head_surgery.takes_shapes(module) and not stream_surgery.takes_shapes(module):
        raise PruneError(f"{name}: a {type(module).__name__} cannot take new widths")

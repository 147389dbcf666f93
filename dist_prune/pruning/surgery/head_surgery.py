"""Surgery on whole units: heads of attention modules and groups of grouped convolutions. See head_groups.py."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from dist_prune.pruning.graph.head_groups import ATTENTION, attentions, separate_parts
from dist_prune.pruning.graph.unit_forms import FORMS, update_units
from dist_prune.pruning.surgery import channel_attributes


def update_counts(model: nn.Module) -> None:
    """Set head counts of attention modules and channel counts of blocks to those of their layers, in place.

    Call it once after the layers were cut; a network that lost nothing does not change.
    """
    for _, module, kind in attentions(model):
        if hasattr(module, "query_key_rows"):
            continue  # it keeps all heads
        width = getattr(module, "head_dim", None) or round(module.scale**-2)
        module.num_heads = module.proj.in_features // width
        if kind.total:
            setattr(module, kind.total, module.proj.in_features)
    update_units(model)
    layer: Any
    for layer in model.modules():
        parts = separate_parts(layer)
        if parts is not None and parts.count:
            setattr(layer, parts.count, layer.q_proj.out_features // layer.head_dim)
        elif isinstance(layer, nn.Embedding):
            layer.embedding_dim = layer.weight.shape[1]
    channel_attributes.update_channel_attributes(model)


def has_heads(module: Any) -> bool:
    """Whether a module is an attention module of a class whose heads can be removed."""
    path = f"{type(module).__module__}.{type(module).__qualname__}"
    return path in ATTENTION or path in FORMS


def takes_shapes(module: nn.Module) -> bool:
    """Whether a module has a parameter with one column per head, which may become narrower."""
    kind = ATTENTION.get(f"{type(module).__module__}.{type(module).__qualname__}")
    return kind is not None and bool(kind.table)


def cut_table(module: nn.Module, positions: Iterable[int]) -> None:
    """Remove columns from an attention module's table, in place.

    Args:
        module: an attention module for which ``takes_shapes`` is true.
        positions: the heads that are removed.
    """
    key = ATTENTION[f"{type(module).__module__}.{type(module).__qualname__}"].table
    old, gone = getattr(module, key), set(positions)
    kept = [i for i in range(old.shape[1]) if i not in gone]
    setattr(module, key, nn.Parameter(old.data[:, kept].clone(), old.requires_grad))


def cut_grouped(module: nn.Conv2d | nn.ConvTranspose2d, side: str, positions: Iterable[int]) -> None:
    """Remove whole groups from a grouped convolution, in place.

    Args:
        module: the convolution; its groups are counted anew when the inputs are cut.
        side: ``out`` removes filters; ``in`` changes the counts of input channels and groups only. The weight of a
            transposed convolution has its input channels first: there ``in`` removes them.
        positions: output or input channels of whole groups.
    """
    gone = set(positions)
    if side == "in":
        each = module.in_channels // module.groups
        if module.transposed:
            _keep_rows(module, [i for i in range(module.in_channels) if i not in gone])
        module.in_channels -= len(gone)
        module.groups = module.in_channels // each
        return
    kept = [i for i in range(module.out_channels) if i not in gone]
    module.out_channels = len(kept)
    if not module.transposed:
        _keep_rows(module, kept)
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.data[kept].clone(), module.bias.requires_grad)


def _keep_rows(module: nn.Conv2d | nn.ConvTranspose2d, kept: list[int]) -> None:
    module.weight = nn.Parameter(module.weight.data[kept].clone(), module.weight.requires_grad)

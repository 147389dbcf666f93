"""Whole units cut out of layers: heads of attention modules, groups of grouped convolutions. See head_groups.py."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from dist_prune.pruning.graph.head_groups import ATTENTION, attentions
from dist_prune.pruning.surgery import channel_attributes


def update_counts(model: nn.Module) -> None:
    """Tell attention modules how many heads their layers have now, and blocks that count channels how many there are.
    Changes nothing where none is gone."""
    for _, module, kind in attentions(model):
        width = getattr(module, "head_dim", None) or round(module.scale**-2)
        module.num_heads = module.proj.in_features // width
        if kind.total:
            setattr(module, kind.total, module.proj.in_features)
    channel_attributes.update_channel_attributes(model)


def has_heads(module: Any) -> bool:
    """Whether a module is an attention whose heads can be cut."""
    return f"{type(module).__module__}.{type(module).__qualname__}" in ATTENTION


def takes_shapes(module: nn.Module) -> bool:
    """Whether a module's own parameters may come in another width: a table with fewer heads."""
    kind = ATTENTION.get(f"{type(module).__module__}.{type(module).__qualname__}")
    return kind is not None and bool(kind.table)


def cut_table(module: nn.Module, positions: Iterable[int]) -> None:
    """Take columns out of an attention module's table."""
    key = ATTENTION[f"{type(module).__module__}.{type(module).__qualname__}"].table
    old, gone = getattr(module, key), set(positions)
    stays = [i for i in range(old.shape[1]) if i not in gone]
    setattr(module, key, nn.Parameter(old.data[:, stays].clone(), old.requires_grad))


def cut_grouped(module: nn.Conv2d, side: str, positions: Iterable[int]) -> None:
    """Take whole groups out of a grouped convolution: filters at the outputs, the count of channels at the inputs."""
    gone = set(positions)
    if side == "in":
        each = module.in_channels // module.groups
        module.in_channels -= len(gone)
        module.groups = module.in_channels // each
        return
    stays = [i for i in range(module.out_channels) if i not in gone]
    module.out_channels = len(stays)
    module.weight = nn.Parameter(module.weight.data[stays].clone(), module.weight.requires_grad)
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.data[stays].clone(), module.bias.requires_grad)

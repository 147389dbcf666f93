"""Attention heads and the groups of grouped convolutions: whole units, each of which is one channel of its group.

A unit takes several positions in each of its layers, and all of them are removed together. Heads are found by the class
of the attention module: ATTENTION declares how each class names its parts.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.pruning.graph.groups import ChannelGroup, Coupling, HookPoint, Layer

Root = Callable[[tuple[str, int]], tuple[str, int]]  # (group, channel) -> the representative of its unit


@dataclass(frozen=True)
class Fused:
    """Names of the parts of an attention module with one layer for queries, keys and values, (3, heads, width) outputs.

    Attributes:
        table: name of its parameter of shape (rows, heads), or "".
        total: name of its attribute that holds heads * head width, or "".
        without: submodules that must be absent or ``nn.Identity``, because they mix heads or depend on their number.
    """

    table: str = ""
    total: str = ""
    without: tuple[str, ...] = ()


ATTENTION = {
    "timm.layers.attention.Attention": Fused(total="attn_dim", without=("norm", "gate")),
    "timm.models.swin_transformer.WindowAttention": Fused(table="relative_position_bias_table"),
}

# Attention modules of transformers with layers q_proj, k_proj, v_proj, o_proj, which find the number of heads from the
# layers' outputs and ``head_dim``: nothing else changes with the heads.
SEPARATE = {
    f"transformers.models.{module}.modeling_{module}.{name}Attention"
    for module, name in {
        "vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters",
        "ijepa": "IJepa", "vit_msn": "ViTMSN",
    }.items()
}  # fmt: skip


@dataclass(frozen=True)
class Separate:
    """Names of the parts of an attention module of transformers with layers q_proj, k_proj and v_proj.

    Attributes:
        output: name of the layer that reads the heads.
        count: name of its attribute that holds the number of heads and has to follow it, or "".
        streams: whether its heads are found only if streams are asked for, so that older plans stay.
    """

    output: str = "o_proj"
    count: str = ""
    streams: bool = False


_LATER = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}
SEPARATE_PARTS = {
    **dict.fromkeys(SEPARATE, Separate()),
    **{
        f"transformers.models.{module}.modeling_{module}.{name}Attention": Separate("out_proj", streams=True)
        for module, name in _LATER.items()
    },
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention": Separate(count="num_heads", streams=True),
}


def separate_parts(module: nn.Module) -> Separate | None:
    """Return the names of the parts of an attention module with separate layers; None for other modules."""
    return SEPARATE_PARTS.get(f"{type(module).__module__}.{type(module).__qualname__}")


def attentions(model: nn.Module) -> Iterable[tuple[str, Any, Fused]]:
    """Yield (path, module, names of its parts) of the attention modules whose heads can be removed."""
    for name, module in model.named_modules():
        kind = ATTENTION.get(f"{type(module).__module__}.{type(module).__qualname__}")
        if kind is not None and all(_absent(getattr(module, submodule, None)) for submodule in kind.without):
            yield name, module, kind


def head_tables(model: nn.Module) -> dict[str, Layer]:
    """Return attention path -> its table of one column per head, as a layer that has parameters and no MACs."""
    tables = {}
    for name, module, kind in attentions(model):
        if kind.table:
            rows, heads = getattr(module, kind.table).shape
            tables[name] = Layer(name, "table", heads, heads, bias=rows)
    return tables


def replace_with_heads(
    model: nn.Module, groups: Iterable[ChannelGroup], layers: Mapping[str, Layer], streams: bool = False
) -> list[ChannelGroup]:
    """Return the groups, with those of queries, keys and values replaced by groups of whole heads.

    Args:
        model: the bare network.
        groups: its groups as traced channel by channel.
        layers: its layers.
        streams: whether heads of the classes count that are found with streams only.
    """
    heads = {}
    for name, module, kind in attentions(model):
        qkv = f"{name}.qkv"
        proj = f"{name}.proj"
        count = module.num_heads
        if qkv not in layers or proj not in layers:
            continue
        width = layers[proj].width_in
        if layers[qkv].width_out != 3 * width or width % count:
            continue
        of = [position // (width // count) for position in range(width)]
        couplings = [
            Coupling(qkv, "out", tuple(range(3 * width)), tuple(3 * of)),
            Coupling(proj, "in", tuple(range(width)), tuple(of)),
        ]
        if kind.table:
            couplings.append(Coupling(name, "out", tuple(range(count)), tuple(range(count))))
        heads[qkv] = _head_group(count, (qkv,), couplings)
    groups = [heads.get(group.name, group) if group.producers == (group.name,) else group for group in groups]
    for group in _separate_heads(model, layers, streams):
        members = [other for other in groups if set(other.producers) <= set(group.producers)]
        if {name for other in members for name in other.producers} == set(group.producers):
            groups = [other for other in groups if other not in members] + [group]
    return groups


def _separate_heads(model: nn.Module, layers: Mapping[str, Layer], streams: bool) -> Iterable[ChannelGroup]:
    """Yield the group of heads of each attention module with separate layers that are as wide as one another."""
    for name, module in model.named_modules():
        parts = separate_parts(module)
        if parts is None or (parts.streams and not streams):
            continue
        inputs, output = tuple(f"{name}.{part}_proj" for part in "qkv"), f"{name}.{parts.output}"
        if not {*inputs, output} <= layers.keys():
            continue
        width, each = layers[output].width_in, int(module.head_dim)  # type: ignore[arg-type]
        if any(layers[part].width_out != width for part in inputs) or width % each:
            continue
        positions, of = tuple(range(width)), tuple(position // each for position in range(width))
        couplings = [Coupling(part, "out", positions, of) for part in inputs] + [Coupling(output, "in", positions, of)]
        yield _head_group(width // each, inputs, couplings)


def _head_group(count: int, producers: tuple[str, ...], couplings: Iterable[Coupling]) -> ChannelGroup:
    why = "it has a single head" if count == 1 else ""
    return ChannelGroup(producers[0], count, producers, tuple(couplings), why, unit="head")


def merge_grouped_convs(
    groups: Iterable[ChannelGroup], layers: Mapping[str, Layer], rank: Callable[[str], Any]
) -> list[ChannelGroup]:
    """Return the groups, with those that meet in grouped convolutions merged into groups of units.

    All channels that enter one group of such a convolution, and all that leave it, are one unit.

    Args:
        groups: the network's groups as traced channel by channel.
        layers: the network's layers.
        rank: sort key of layer names; the producer with the smallest leads a merged group.
    """
    groups = list(groups)
    parent: dict[tuple[str, int], tuple[str, int]] = {}

    def root(node: tuple[str, int]) -> tuple[str, int]:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    meets: dict[str, str] = {}  # group -> a representative of the groups that it meets

    def cluster(name: str) -> str:
        while meets.setdefault(name, name) != name:
            name = meets[name]
        return name

    seen: dict[tuple[str, int], tuple[str, int]] = {}
    for group in groups:
        for coupling in group.couplings:
            layer = layers[coupling.layer]
            if layer.groups == 1 or layer.depthwise:
                continue
            each = (layer.width_out if coupling.side == "out" else layer.width_in) // layer.groups
            for position, channel in zip(coupling.index, coupling.channel, strict=True):
                node = seen.setdefault((layer.name, position // each), (group.name, channel))
                parent[root((group.name, channel))] = root(node)
                meets[cluster(group.name)] = cluster(node[0])
    clusters: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        if group.name in meets:
            clusters.setdefault(cluster(group.name), []).append(group)
    apart = [group for group in groups if group.name not in meets]
    return apart + [group for members in clusters.values() for group in _merge(members, layers, root, rank)]


def fold_units(point: HookPoint, maps: Tensor) -> Tensor:
    """Reshape maps or a weight at a hook point so that each unit is one channel; plain channels are left as they are.

    Outputs (N, C, H, W) of a convolution become (N, units, positions * H, W). Those of a linear layer, (N, tokens, C),
    (N, C) or (N, H, W, C), become (N, units, positions, tokens). A weight (C, in, ...) becomes (units, positions * in,
    ...).

    Args:
        point: the hook point; its ``unit_order`` says which outputs belong to a unit.
        maps: the layer's output, or its weight if ``point.side`` is ``weight``.
    """
    if not point.unit_order:
        return maps
    order = torch.tensor(point.unit_order).to(maps.device, non_blocking=True)
    if point.side == "weight":
        rows = maps.index_select(0, order)
        return rows.reshape(point.width, -1, *rows.shape[2:])
    if point.kind == "conv":
        return maps.index_select(1, order).reshape(len(maps), point.width, -1, maps.shape[3])
    rows = maps.index_select(-1, order).reshape(len(maps), -1, point.width, len(order) // point.width)
    return rows.permute(0, 2, 3, 1)


def _absent(submodule: Any) -> bool:
    return submodule is None or isinstance(submodule, nn.Identity)


def _merge(
    members: list[ChannelGroup], layers: Mapping[str, Layer], root: Root, rank: Callable[[str], Any]
) -> list[ChannelGroup]:
    """Merge groups that meet in grouped convolutions into one; if it cannot be cut, return them protected."""
    producers = tuple(sorted({name for group in members for name in group.producers}, key=rank))
    leader = next(group for group in members if producers[0] in group.producers)
    nodes = [root((group.name, channel)) for group in [leader, *members] for channel in range(group.width)]
    number = {node: i for i, node in enumerate(dict.fromkeys(nodes))}  # in the order of the leader's channels
    couplings = [
        replace(coupling, channel=tuple(number[root((group.name, channel))] for channel in coupling.channel))
        for group in members
        for coupling in group.couplings
    ]
    merged = ChannelGroup(producers[0], len(number), producers, tuple(couplings), unit="conv group")
    why = next((group.protected for group in members if group.protected), "") or why_uneven(merged)
    why = why or _why_incomplete(merged, layers)
    if not why and len(number) == 1:
        why = "grouped convolutions tie all of its channels to one another"
    return [replace(group, protected=group.protected or why) for group in members] if why else [merged]


def _why_incomplete(group: ChannelGroup, layers: Mapping[str, Layer]) -> str:
    """Return the reason if a side of a grouped convolution is not wholly in the group, or an empty string."""
    for name in group.layers:
        layer = layers[name]
        if layer.groups == 1 or layer.depthwise:
            continue
        both = (("in", layer.width_in), ("out", layer.width_out))
        for side, width in both if layer.kind == "conv" else both[1:]:
            positions = {i for c in group.couplings if (c.layer, c.side) == (name, side) for i in c.index}
            if len(positions) < width:
                what = "on both sides of {}, a grouped convolution" if layer.kind == "conv" else "of {}, a group norm"
                return f"not all channels {what.format(name)}, are known"
    return ""


def why_uneven(group: ChannelGroup) -> str:
    """Return the reason if the channels of a group take unequal shares of a layer, or an empty string."""
    for coupling in group.couplings:
        counts = torch.bincount(torch.tensor(coupling.channel), minlength=group.width)
        if len(set(counts.tolist())) > 1:
            return f"its channels take unequal shares of {coupling.layer}"
    return ""

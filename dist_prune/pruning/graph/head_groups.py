"""Whole units: attention heads, and the groups of grouped convolutions. A unit is one channel of its channel group.

A unit takes several positions in each layer it runs through, and all of them go together. Heads are found by the class
of the attention module: ATTENTION declares how each class names its parts.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.pruning.graph.groups import ChannelGroup, Coupling, HookPoint, Layer

Root = Callable[[tuple[str, int]], tuple[str, int]]  # (group, channel) -> the one that stands for its unit


@dataclass(frozen=True)
class Fused:
    """An attention module with one linear layer for queries, keys and values, (3, heads, head width) outputs.

    Attributes:
        table: its parameter of shape (rows, heads), or "".
        total: its attribute that holds heads * head width, or "".
        without: submodules that must be absent or nn.Identity: they mix heads, or are made for all of them.
    """

    table: str = ""
    total: str = ""
    without: tuple[str, ...] = ()


ATTENTION = {
    "timm.layers.attention.Attention": Fused(total="attn_dim", without=("norm", "gate")),
    "timm.models.swin_transformer.WindowAttention": Fused(table="relative_position_bias_table"),
}


def attentions(model: nn.Module) -> Iterable[tuple[str, Any, Fused]]:
    """(path, module, how its parts are called) of the attention modules whose heads can be cut."""
    for name, module in model.named_modules():
        kind = ATTENTION.get(f"{type(module).__module__}.{type(module).__qualname__}")
        if kind is not None and all(_absent(getattr(module, part, None)) for part in kind.without):
            yield name, module, kind


def head_tables(model: nn.Module) -> dict[str, Layer]:
    """Attention path -> its table of one column per head, as a layer: it has parameters and no multiplications."""
    found = {}
    for name, module, kind in attentions(model):
        if kind.table:
            rows, heads = getattr(module, kind.table).shape
            found[name] = Layer(name, "table", heads, heads, bias=rows)
    return found


def with_heads(model: nn.Module, groups: Iterable[ChannelGroup], layers: Mapping[str, Layer]) -> list[ChannelGroup]:
    """The groups, with those of attention outputs replaced by groups of whole heads."""
    heads = {}
    for name, module, kind in attentions(model):
        qkv, proj, count = f"{name}.qkv", f"{name}.proj", module.num_heads
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
        why = "it has a single head" if count == 1 else ""
        heads[qkv] = ChannelGroup(qkv, count, (qkv,), tuple(couplings), why, unit="head")
    return [heads.get(group.name, group) if group.producers == (group.name,) else group for group in groups]


def merge_grouped_convs(
    groups: Iterable[ChannelGroup], layers: Mapping[str, Layer], rank: Callable[[str], Any]
) -> list[ChannelGroup]:
    """The groups, with those that meet in grouped convolutions put together, their units in place of channels.

    All that enters one group of such a convolution and all that leaves it is one unit.
    """
    groups = list(groups)
    parent: dict[tuple[str, int], tuple[str, int]] = {}

    def root(node: tuple[str, int]) -> tuple[str, int]:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    meets: dict[str, str] = {}  # group -> a representative of those it meets

    def clan(name: str) -> str:
        while meets.setdefault(name, name) != name:
            name = meets[name]
        return name

    seen: dict[tuple[str, int], tuple[str, int]] = {}
    for group in groups:
        for coupling in group.couplings:
            layer = layers[coupling.layer]
            if layer.groups == 1 or layer.depthwise or layer.kind != "conv":
                continue
            each = (layer.width_out if coupling.side == "out" else layer.width_in) // layer.groups
            for position, channel in zip(coupling.index, coupling.channel, strict=True):
                node = seen.setdefault((layer.name, position // each), (group.name, channel))
                parent[root((group.name, channel))] = root(node)
                meets[clan(group.name)] = clan(node[0])
    clans: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        if group.name in meets:
            clans.setdefault(clan(group.name), []).append(group)
    out = [group for group in groups if group.name not in meets]
    return out + [group for members in clans.values() for group in _one(members, layers, root, rank)]


def fold_units(point: HookPoint, maps: Tensor) -> Tensor:
    """Maps or a weight at a site with a unit as its channel; of plain channels as they are.

    Outputs (N, C, H, W) become (N, units, positions * H, W), (N, tokens, C) and (N, C) become (N, units, positions,
    tokens); a weight (C, in, ...) becomes (units, positions * in, ...).
    """
    if not point.unit_order:
        return maps
    order = torch.tensor(point.unit_order).to(maps.device, non_blocking=True)
    if point.side == "weight":
        rows = maps.index_select(0, order)
        return rows.reshape(point.width, -1, *rows.shape[2:])
    if maps.dim() == 4:
        return maps.index_select(1, order).reshape(len(maps), point.width, -1, maps.shape[3])
    rows = maps.index_select(-1, order).reshape(len(maps), -1, point.width, len(order) // point.width)
    return rows.permute(0, 2, 3, 1)


def _absent(part: Any) -> bool:
    return part is None or isinstance(part, nn.Identity)


def _one(
    members: list[ChannelGroup], layers: Mapping[str, Layer], root: Root, rank: Callable[[str], Any]
) -> list[ChannelGroup]:
    """Groups that meet in grouped convolutions as one; as they were, with the reason, where they cannot be cut."""
    producers = tuple(sorted({name for group in members for name in group.producers}, key=rank))
    leader = next(group for group in members if producers[0] in group.producers)
    nodes = [root((group.name, channel)) for group in [leader, *members] for channel in range(group.width)]
    number = {node: i for i, node in enumerate(dict.fromkeys(nodes))}  # in the order of the leader's channels
    couplings = [
        replace(coupling, channel=tuple(number[root((group.name, channel))] for channel in coupling.channel))
        for group in members for coupling in group.couplings
    ]  # fmt: skip
    found = ChannelGroup(producers[0], len(number), producers, tuple(couplings), unit="conv group")
    why = next((group.protected for group in members if group.protected), "") or why_uneven(found)
    why = why or _open(found, layers)
    if not why and len(number) == 1:
        why = "grouped convolutions tie all of its channels to one another"
    return [replace(group, protected=group.protected or why) for group in members] if why else [found]


def _open(group: ChannelGroup, layers: Mapping[str, Layer]) -> str:
    """Why a group of conv groups cannot be cut where one side of a grouped convolution is not in it, or nothing."""
    for name in group.layers:
        layer = layers[name]
        if layer.kind != "conv" or layer.groups == 1 or layer.depthwise:
            continue
        for side, width in (("in", layer.width_in), ("out", layer.width_out)):
            places = {i for c in group.couplings if (c.layer, c.side) == (name, side) for i in c.index}
            if len(places) < width:
                return f"not all channels on both sides of {name}, a grouped convolution, are known"
    return ""


def why_uneven(group: ChannelGroup) -> str:
    """Why a group cannot be cut where its channels take unequal shares of a layer, or an empty string."""
    for coupling in group.couplings:
        counts = torch.bincount(torch.tensor(coupling.channel), minlength=group.width)
        if len(set(counts.tolist())) > 1:
            return f"its channels take unequal shares of {coupling.layer}"
    return ""

"""Masks of a plan's blocks: what stays exactly zero through training, and which channels are gone with their blocks."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dist_prune.errors import PruneError
from dist_prune.pruning.blocks import Blocks, left
from dist_prune.pruning.channels import ChannelGroup, Channels, Side
from dist_prune.pruning.choose import Request
from dist_prune.pruning.consumers import ChannelPoint, consumers, producers
from dist_prune.pruning.plan import Plan


def block_mask(blocks: Blocks, width_out: int, width_in: int) -> Tensor:
    """(out, in) bool, False where a block is cut."""
    mask = torch.ones((width_out, width_in), dtype=torch.bool)
    for rows, cut in zip(blocks.rows, blocks.cut, strict=True):
        columns = [j for group in cut for j in blocks.columns[group]]
        mask[torch.tensor(rows)[:, None], torch.tensor(columns, dtype=torch.long)[None]] = False
    return mask


def masks_of(plan: Plan, channels: Channels, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter name -> bool mask, False where the small network's weight is held at zero.

    Args:
        channels: of the dense network.
        weights: state dict of the network that the plan left: the masks get its shapes.
    """
    if not plan.blocks:
        return {}
    stays, out = left(channels, plan.removed), {}
    for name, blocks in plan.blocks.items():
        layer = _layer(channels, name)
        mask = block_mask(blocks, layer.width_out, layer.width_in)
        mask = mask[stays[name, "out"]][:, stays[name, "in"]]
        shape = weights[f"{name}.weight"].shape
        out[f"{name}.weight"] = mask.view(*mask.shape, *[1] * (len(shape) - 2)).expand(shape).contiguous()
    return out


@torch.no_grad()
def zero(model: nn.Module, channels: Channels, plan: Plan) -> None:
    """Set the plan's blocks to zero in a dense ``model``, in place."""
    for name, blocks in plan.blocks.items():
        layer = _layer(channels, name)
        weight = model.get_parameter(f"{name}.weight")
        mask = block_mask(blocks, layer.width_out, layer.width_in).to(weight.device)
        weight.masked_fill_(~mask.view(*mask.shape, *[1] * (weight.dim() - 2)), 0)


def weights_left(plan: Plan, channels: Channels) -> dict[str, tuple[int, int]]:
    """Convolution or linear layer -> (weights that are neither removed nor masked, weights of the dense layer)."""
    stays, out = left(channels, plan.removed), {}
    for name, layer in channels.layers.items():
        if layer.kind not in ("conv", "linear"):
            continue
        rows, columns = stays[name, "out"], stays[name, "in"]
        per_row = 1 if layer.depthwise else layer.width_in // layer.groups
        kept = len(rows) * (per_row if layer.groups > 1 else len(columns))
        if name in plan.blocks:
            kept = int(block_mask(plan.blocks[name], layer.width_out, layer.width_in)[rows][:, columns].sum())
        out[name] = (kept * layer.kernel, layer.width_out * per_row * layer.kernel)
    return out


def violations(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> list[str]:
    """The masked weights that are not exactly zero where they should be."""
    return [name for name, mask in masks.items() if bool((weights[name].cpu() * ~mask != 0).any())]


def promoted(plan: Plan, channels: Channels, request: Request) -> Plan:
    """The plan with every channel removed for real that nothing reaches any more, or that reaches nothing.

    That is a channel of a free group all of whose incoming blocks are cut in every layer that makes it, or all of
    whose outgoing ones in every layer that reads it; again, until no more are found. Floors and rounding of the request
    hold: where they ask for more channels, the first ones stay, masked. A channel that nothing reaches is a constant
    (its bias, or its batch norm's shift); with the channel the constant goes as well.
    """
    removed = {group: set(gone) for group, gone in plan.removed.items()}
    names = set(plan.blocks)
    grids = {n: block_mask(plan.blocks[n], channels.layers[n].width_out, channels.layers[n].width_in) for n in names}
    while True:
        stays = left(channels, removed)
        found = {}
        for group in channels.free:
            gone = removed.get(group.name, set())
            dead = set(_dead(group, channels, grids, stays)) - gone
            count = request.width(group, group.width - len(gone) - len(dead))
            spare = count - (group.width - len(gone) - len(dead))
            if dead := set(sorted(dead)[max(spare, 0) :]):
                found[group.name] = dead
        if not found:
            break
        for name, dead in found.items():
            removed.setdefault(name, set()).update(dead)
    whole = {name: tuple(sorted(gone)) for name, gone in removed.items()}
    reasons = {group: why for group, why in plan.reasons.items() if group not in whole}
    return Plan(whole, plan.widths, reasons, plan.blocks)


def _dead(
    group: ChannelGroup, channels: Channels, grids: Mapping[str, Tensor], stays: Mapping[tuple[str, Side], list[int]]
) -> Iterable[int]:
    """The group's channels whose incoming or whose outgoing blocks are all cut among what is left."""

    def dead(points: Sequence[ChannelPoint], other: Side) -> set[int]:
        unreached = []
        for point in points:
            grid, coupling = grids.get(point.site.layer), point.coupling
            if grid is None:
                return set()
            alive = (grid if other == "in" else grid.T)[:, stays[point.site.layer, other]].any(1).tolist()
            living = {c for i, c in zip(coupling.index, coupling.channel, strict=True) if alive[i]}
            unreached.append(set(coupling.channel) - living)
        return set.intersection(*unreached) if unreached else set()

    return dead(producers(channels, group), "in") | dead(consumers(channels, group), "out")


def _layer(channels: Channels, name: str):
    layer = channels.layers.get(name)
    if layer is None or layer.kind not in ("conv", "linear") or layer.groups != 1:
        raise PruneError(f"the plan cuts blocks of {name!r}, which is no plain convolution or linear layer here")
    return layer

"""Training that makes channels small before they are cut: what is added to gradients, after ranks have averaged them.

``bn_scale``: the sign of each batch norm's scale, the subgradient of its L1 norm (Liu et al., Network Slimming, ICCV
2017, eq. 1). ``group_norm``: each weight tied to a channel times 2^(4 (I_max - I) / (I_max - I_min)), I the channel's
squared group norm: channels that are small already shrink up to 16 times as fast (Fang et al., DepGraph, CVPR 2023,
section 3.3).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dist_prune.pruning.channels import ChannelGroup, Channels, Coupling
from dist_prune.pruning.combine import gathered

STEEPNESS = 4.0


def penalty(kind: str, model: nn.Module, channels: Channels, weight: float) -> Callable[[], None]:
    """What adds ``weight`` times the penalty's gradient to the gradients of the free groups' parameters."""
    shrink = {"bn_scale": _scales, "group_norm": _groups}[kind]

    @torch.no_grad()
    def add() -> None:
        for parameter, term in shrink(model, channels):
            if parameter.grad is not None:
                parameter.grad.add_(term, alpha=weight)

    return add


def _scales(model: nn.Module, channels: Channels) -> Iterator[tuple[nn.Parameter, Tensor]]:
    names = {c.layer for group in channels.free for c in group.couplings if channels.layers[c.layer].kind == "norm"}
    for name in sorted(names):
        if channels.layers[name].bias:
            scale = _weight(model, name)
            yield scale, scale.sign()


def _groups(model: nn.Module, channels: Channels) -> Iterator[tuple[nn.Parameter, Tensor]]:
    for group in channels.free:
        members = list(_members(channels, group))
        sizes = torch.stack([
            gathered(_sides(_weight(model, c.layer), side).flatten(1).square().sum(1).cpu(), c, group.width)
            for c, side in members
        ]).sum(0)  # fmt: skip
        spread = (sizes.max() - sizes.min()).clamp(min=1e-12)
        factor = torch.exp2(STEEPNESS * (sizes.max() - sizes) / spread)
        for coupling, side in members:
            parameter = _weight(model, coupling.layer)
            term = torch.zeros_like(parameter)
            index = torch.tensor(coupling.index, device=parameter.device)
            each = factor[torch.tensor(coupling.channel)].to(parameter.device, parameter.dtype)
            rows = _sides(parameter, side)[index]
            _sides(term, side)[index] = rows * each.view(-1, *[1] * (rows.dim() - 1))
            yield parameter, term


def _members(channels: Channels, group: ChannelGroup) -> Iterator[tuple[Coupling, str]]:
    """Where weights of the group lie, and along which side of them its channels do."""
    for coupling in group.couplings:
        layer = channels.layers[coupling.layer]
        if coupling.side == "in" and layer.groups > 1 and not layer.depthwise:
            continue  # a grouped convolution's filters go whole, and count at the outputs
        if layer.kind in ("conv", "linear") or (layer.kind == "norm" and layer.bias):
            yield coupling, "in" if coupling.side == "in" and not layer.depthwise else "out"


def _sides(weight: Tensor, side: str) -> Tensor:
    """A view with the channels first; a norm's scale is (C, 1)."""
    return (weight.transpose(0, 1) if side == "in" else weight) if weight.dim() > 1 else weight[:, None]


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_submodule(name).weight  # type: ignore[return-value]

"""Sparse learning: terms that make channels small before pruning. They are added to gradients averaged over ranks.

``bn_scale``: the sign of each batch norm's scale, the subgradient of its L1 norm (Liu et al., Network Slimming, ICCV
2017, eq. 1). ``group_norm``: each weight tied to a channel times 2^(4 (I_max - I) / (I_max - I_min)), I the channel's
squared group norm: channels that are small already shrink up to 16 times as fast (Fang et al., DepGraph, CVPR 2023,
section 3.3).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_prune.pruning.graph.channel_tensors import to_device_of
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph

STEEPNESS = 4.0


def sparsity_gradient(kind: str, model: nn.Module, graph: DependencyGraph, weight: float) -> Callable[[], None]:
    """Return a function that adds ``weight`` times the penalty's gradient to the gradients of ``model``, in place.

    Call it after the backward pass and before the optimizer's step. Parameters without a gradient are left alone.

    Args:
        kind: ``bn_scale`` (Network Slimming, eq. 1) or ``group_norm`` (DepGraph, section 3.3).
        model: the bare network that ``graph`` was traced on.
        graph: only the parameters of its free groups get a term.
        weight: factor of the penalty.
    """
    groups = list(graph.free) if kind == "group_norm" else []
    members: dict[str, list[_GroupWeights]] = {}

    @torch.no_grad()
    def add() -> None:
        if groups and not members:  # at the first update: the weights are on their device now
            members.update({group.name: list(_group_weights(model, graph, group)) for group in groups})
        terms = itertools.chain(*map(_group_norm_terms, members.values())) if groups else _bn_scale_terms(model, graph)
        for parameter, term in terms:
            if parameter.grad is not None:
                parameter.grad.add_(term, alpha=weight)

    return add


def _bn_scale_terms(model: nn.Module, graph: DependencyGraph) -> Iterator[tuple[nn.Parameter, Tensor]]:
    names = {c.layer for group in graph.free for c in group.couplings if graph.layers[c.layer].kind == "norm"}
    for name in sorted(names):
        if graph.layers[name].bias:
            scale = _weight(model, name)
            yield scale, scale.sign()


@dataclass(frozen=True)
class _GroupWeights:
    """Weights of a group in one parameter: positions ``index`` along a side belong to channels ``channel``.

    Both index tensors are on the parameter's device from the beginning: a copy per update would block.
    """

    parameter: nn.Parameter
    side: str
    index: Tensor
    channel: Tensor
    width: int

    @property
    def weights(self) -> Tensor:
        """(positions, ...) weights of the group."""
        return _sides(self.parameter, self.side)[self.index]

    def squares(self) -> Tensor:
        """(C,) squared norm of each channel's weights."""
        each = _sides(self.parameter, self.side).flatten(1).square().sum(1)
        return each.new_zeros(self.width).index_add_(0, self.channel, each[self.index])


def _group_norm_terms(members: Sequence[_GroupWeights]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    sizes = torch.stack([member.squares() for member in members]).sum(0)
    spread = (sizes.max() - sizes.min()).clamp(min=1e-12)
    factor = torch.exp2(STEEPNESS * (sizes.max() - sizes) / spread)
    for member in members:
        weights, term = member.weights, torch.zeros_like(member.parameter)
        each = factor[member.channel].to(weights.dtype).view(-1, *[1] * (weights.dim() - 1))
        _sides(term, member.side)[member.index] = weights * each
        yield member.parameter, term


def _group_weights(model: nn.Module, graph: DependencyGraph, group: ChannelGroup) -> Iterator[_GroupWeights]:
    """The parameters that hold weights of the group, with the side along which its channels lie."""
    for coupling in group.couplings:
        layer = graph.layers[coupling.layer]
        if coupling.side == "in" and layer.groups > 1 and not layer.depthwise:
            continue  # a grouped convolution loses whole filters, which count at the outputs
        if layer.kind in ("conv", "linear") or (layer.kind == "norm" and layer.bias):
            side = "in" if coupling.side == "in" and not layer.depthwise else "out"
            parameter = _weight(model, coupling.layer)
            index, channel = (to_device_of(torch.tensor(at), parameter) for at in (coupling.index, coupling.channel))
            yield _GroupWeights(parameter, side, index, channel, group.width)


def _sides(weight: Tensor, side: str) -> Tensor:
    """A view with the channels first; a norm's scale is (C, 1)."""
    return (weight.transpose(0, 1) if side == "in" else weight) if weight.dim() > 1 else weight[:, None]


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_submodule(name).weight  # type: ignore[return-value]

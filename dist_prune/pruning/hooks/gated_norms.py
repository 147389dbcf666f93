"""Norms over channels that compute over the channels that are left, as they do after surgery."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.pruning.graph.stream_layers import norm_form
from dist_prune.pruning.module_calls import first_input


def normalise(module: nn.Module, maps: Tensor, weights: Tensor) -> Tensor:
    """Compute a norm over channels with a weight on each channel, before its scale and shift.

    The mean is sum(w x) / sum(w) and the variance sum(w (x - mean)^2) / sum(w): with weights of 0 and 1 those of the
    channels that are left, with weights of 1 the norm itself.

    Args:
        module: a norm for which ``norm_form`` is not None.
        maps: its input, floating point; its channels on the last axis.
        weights: (C,), or (n, 1, ..., C) as ``maps``; not negative.

    Returns:
        The normalised maps, of the shape of ``maps``; channels of weight 0 are normalised like the others.
    """
    form: Any = norm_form(module)
    groups = getattr(module, "num_groups", 0)
    folded, w = maps, weights.expand(maps.shape)
    axes: tuple[int, ...] = (-1,)
    if groups:  # a group norm: over all places as well
        folded = maps.reshape(len(maps), -1, groups, maps.shape[-1] // groups)
        w, axes = w.reshape(folded.shape), (1, -1)
    total = w.sum(axes, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    if form.centred:
        folded = folded - (w * folded).sum(axes, keepdim=True) / total
    variance = (w * folded * folded).sum(axes, keepdim=True) / total
    eps = getattr(module, "eps", None)
    eps = torch.finfo(maps.dtype).eps if eps is None else float(eps)  # type: ignore[arg-type]
    return (folded * torch.rsqrt(variance + eps)).reshape(maps.shape)


@contextmanager
def gated_norm(model: nn.Module, layer: str, values: Sequence[Any]) -> Iterator[None]:
    """Run ``model`` with a norm over the channels that are left; the hook is removed afterwards.

    Args:
        model: the network.
        layer: module path of the norm.
        values: functions from the number of images to weights (n or 1, C), bool or floating point: one for each group
            that has channels there.
    """

    def replacement(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        maps, axis = first_input(args, kwargs), norm_form(module).axis  # type: ignore[union-attr]
        maps = maps.movedim(axis, -1)
        wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
        weights = torch.ones((), dtype=wide.dtype, device=wide.device)
        for value in values:
            rows = value(maps)
            rows = rows.view(len(rows), *[1] * (maps.dim() - 2), -1)
            if not rows.is_floating_point():
                wide = torch.where(rows, wide, 0)  # a channel that is gone may hold infinities
            weights = weights * rows.to(wide.dtype)
        out = normalise(module, wide, weights)
        scale, shift = getattr(module, "weight", None), getattr(module, "bias", None)
        out = out if scale is None else out * scale
        out = (out if shift is None else out + shift).to(output.dtype).movedim(-1, axis)
        for after in ("drop", "act"):  # timm's norms with an activation of their own
            out = getattr(module, after, nn.Identity())(out)
        return out

    handle = model.get_submodule(layer).register_forward_hook(replacement, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()

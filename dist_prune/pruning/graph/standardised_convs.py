"""Convolutions whose weight is standardised over the inputs of each filter, as NFNet's and BiT's (Qiao et al. 2019)."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

_PATHS = tuple(
    f"timm.layers.std_conv.{prefix}StdConv2d{suffix}" for prefix in ("", "Scaled") for suffix in ("", "Same")
)


def is_standardised(module: nn.Module) -> bool:
    """Whether a module is a convolution that standardises its weight in each forward pass."""
    return f"{type(module).__module__}.{type(module).__qualname__}" in _PATHS


def standardise(module: Any, kept: Tensor) -> Tensor:
    """Standardise a weight over the inputs that are left.

    The mean of a filter is sum(g w) / sum(g), and its variance sum(g (w - mean)^2) / sum(g) over its inputs and kernel:
    with g of 0 and 1 those of the convolution without the other inputs, with g of 1 those of the convolution itself.

    Args:
        module: a convolution for which ``is_standardised`` is true, not grouped.
        kept: (in,) factor g of each input channel; not negative.

    Returns:
        (out, in, kh, kw), scaled by the module's gain if it has one.
    """
    weight = module.weight
    each = kept.to(weight.dtype).view(1, -1, 1, 1)
    total = (each.sum() * weight[0, 0].numel()).clamp(min=torch.finfo(weight.dtype).tiny)
    centred = weight - (each * weight).sum((1, 2, 3), keepdim=True) / total
    variance = (each * centred * centred).sum((1, 2, 3), keepdim=True) / total
    out = centred * torch.rsqrt(variance + module.eps)
    gain = getattr(module, "gain", None)
    return out if gain is None else out * (gain * module.scale)


def padded(module: Any, maps: Tensor) -> Tensor:
    """The input of a convolution with the padding that the module adds by itself, as TensorFlow's "same" is."""
    if not getattr(module, "same_pad", False):
        return maps
    pad = sys.modules[type(module).__module__].pad_same
    return pad(maps, module.kernel_size, module.stride, module.dilation)

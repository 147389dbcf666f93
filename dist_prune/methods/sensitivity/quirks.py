"""Departures of the released programs of Sensitivity Pruner: one function for each quirk.

The quirks ``raw_logits``, ``fresh_norms`` and ``padding_32`` are functions of their names, ``reshape`` is
``as_released_reshape`` and ``small_mask`` is ``shrink_weights``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def raw_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the summed loss, (): minus the right class's logit, not normalised over classes."""
    return -logits.gather(1, labels[:, None]).sum()


def as_released_reshape(sensitivity: Tensor) -> Tensor:
    """Mix the entries of filters as the program does: (C, I, k, k) -> (C, I, k, k), to be summed over I.

    The program needs (I, C, k, k) and reshapes instead of transposing, which is right for one input channel only.
    """
    out, inputs, *kernel = sensitivity.shape
    return sensitivity.reshape(inputs, out, *kernel).transpose(0, 1)


@torch.no_grad()
def fresh_norms(network: nn.Module) -> None:
    """Set scale 1 and shift 0 in every batch norm of the scored copy, instead of the trained ones."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


@torch.no_grad()
def shrink_weights(weights: Sequence[Tensor], factor: float = 0.01) -> float:
    """Shrink the weights of the layers being pruned in place: their connections' mask c is 0.01 instead of 1.

    If a batch norm makes the network independent of the scale, the layer's sensitivities are a hundred times as large.

    Args:
        weights: of the layers being pruned.
        factor: c.

    Returns:
        The divisor that makes dL/dc of W c * dL/d(W c).
    """
    for weight in weights:
        weight.mul_(factor)
    return factor


def padding_32() -> int:
    """Return the padding of training images before they are cropped, in pixels: 32 instead of 4."""
    return 32

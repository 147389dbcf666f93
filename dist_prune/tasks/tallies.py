"""Losses and hits counted as integers: sums are exact, and the same for every number of ranks."""

import torch
from torch import Tensor

HUGE = 2.0**18  # a larger mean loss counts as not finite; sums over millions of images stay within int64
LOSS_UNIT = 2**24  # per-image losses are added as multiples of 2**-24: integers, so the order does not matter


def count_losses(losses: Tensor) -> Tensor:
    """Add losses as integers.

    Args:
        losses: (n,) losses of images.

    Returns:
        (2,) int64: the sum in units of 1 / LOSS_UNIT, in which losses that are not finite count as 0, and the number
        of losses that are not finite.
    """
    finite = losses < HUGE
    units = (torch.where(finite, losses, 0.0).double() * LOSS_UNIT).round().long().sum()
    return torch.stack([units, (~finite).sum()])


def mean_of_counted(table: Tensor, images: int) -> float:
    """The mean loss from a merged table of ``count_losses``; nan if a loss was not finite."""
    units, not_finite = table.tolist()
    return mean_loss(units, not_finite, images)


def mean_loss(units: int, not_finite: int, images: int) -> float:
    """The mean loss from the sums of ``count_losses``.

    Args:
        units: sum in units of 1 / LOSS_UNIT.
        not_finite: number of losses that are not finite.
        images: number of images.

    Returns:
        The mean; nan if ``not_finite`` is not 0.
    """
    return float("nan") if not_finite else units / LOSS_UNIT / images


def num_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of images whose largest logit is that of their label.

    Args:
        logits: (..., n, classes).
        labels: (n,) int64.

    Returns:
        (...) int64, on the device of ``logits``.
    """
    return (logits.argmax(-1) == labels).sum(-1)

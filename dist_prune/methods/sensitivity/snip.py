"""Formulas of Sensitivity Pruner: sensitivity of filters, target mask, vote of a learned mask, its schedule. Pure.

Lee, Ajanthan, Torr: SNIP, ICLR 2019 (the sensitivity |W * dL/dW|); Guo et al.: Sensitivity pruner, Pattern Recognition
2023 (filters, target mask, penalty). C is the number of filters of a layer, I that of its inputs, k x k its kernel, W
the number of vectors of a window.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

KEEP = 0.5  # smallest entry of a mask that counts as kept
UNDECIDED = (0.2, 0.8)  # range of undecided entries
DECIDED_SHARE = 0.9  # share of entries outside of it from which on a mask is decided
PUSH = 5.0  # weight of the penalty per share that is kept beyond the target
FLOOR = 0.2  # share of ``keep`` that the fallback leaves of a layer


@torch.no_grad()
def xavier_reinit(network: nn.Module, seed: int, linear: bool = True) -> None:
    """Draw Xavier-normal weights, variance 2 / (fan in + fan out), for every convolution and linear layer, in place.

    They come from the seed alone: one draw on the CPU for the whole network, because each device draws differently.

    Args:
        network: whose weights are replaced.
        seed: the same on every rank.
        linear: whether linear layers get new weights too.
    """
    kinds = (nn.Conv2d, nn.Linear) if linear else (nn.Conv2d,)
    weights = [module.weight for module in network.modules() if isinstance(module, kinds)]
    sizes, like = [weight.numel() for weight in weights], weights[0]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(sum(sizes), generator=generator, dtype=like.dtype).to(like.device).split(sizes)
    for weight, values in zip(weights, drawn, strict=True):
        fans = (weight.shape[0] + weight.shape[1]) * weight[0, 0].numel()
        weight.copy_(values.view_as(weight)).mul_(math.sqrt(2 / fans))


def sensitivities(
    add: Callable[[Sequence[Tensor]], None],
    network: nn.Module,
    weights: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Compute SNIP's signed sensitivity W * dL/dW of the mean loss over the batch of all ranks.

    Gradients are summed over ranks before the absolute value is taken: the absolute value of a mean is not the mean of
    absolute values.

    Args:
        add: sums tensors over ranks in place, as one bucket: the gradients and the number of images.
        network: the re-initialised copy.
        weights: layer -> weight of the copy, with ``requires_grad``.
        images: (n, 3, H, W), this rank's part of the batch.
        labels: (n,) int64.
        loss: (logits, labels) -> () loss summed over images.

    Returns:
        Layer -> sensitivity in the shape of its weight.
    """
    with torch.enable_grad():
        grads = torch.autograd.grad(loss(network(images), labels), list(weights.values()))
    count = grads[0].new_full((1,), len(labels))
    add([*grads, count])
    with torch.no_grad():
        return {
            name: weight * grad / count.clamp(min=1)
            for (name, weight), grad in zip(weights.items(), grads, strict=True)
        }


def filter_scores(sensitivity: Tensor) -> Tensor:
    """Sum |g| of a layer over each filter: (C, I, k, k) or (C, I), signed or not -> (C,) float64."""
    return torch.linalg.vector_norm(sensitivity.flatten(1), 1, dim=1).double()


def target_masks(
    scores: Mapping[str, Tensor], keep: float, sort: Literal["global", "layer"], few: bool = False
) -> dict[str, Tensor]:
    """Choose the filters of the single-shot target, the ones with the largest scores (Guo et al. 2023).

    Args:
        scores: layer -> (C,) of every layer of the pool.
        keep: share of the filters that are kept.
        sort: ``global``: that share of the pool; ``layer``: of each layer.
        few: a layer that would keep fewer than a fifth of that share keeps its best ones up to it; otherwise only a
            layer that would keep none. At least one filter stays.

    Returns:
        Layer -> (C,) bool, True for filters of the target.
    """
    if sort == "global":
        limit = _keep_threshold(torch.cat(list(scores.values())), keep)
        masks = {name: values >= limit for name, values in scores.items()}
    else:
        masks = {name: values >= _keep_threshold(values, keep) for name, values in scores.items()}
    counts = torch.stack([mask.sum() for mask in masks.values()]).tolist()
    for (name, mask), kept in zip(masks.items(), counts, strict=True):
        floor = FLOOR * keep * len(mask)
        if kept == 0 or (few and kept < floor):
            best = scores[name].argsort(descending=True, stable=True)[: max(1, int(floor + 1e-9))]
            masks[name] = torch.zeros_like(mask).index_fill(0, best, True)
    return masks


def _keep_threshold(values: Tensor, keep: float) -> Tensor:
    """The K-th largest of the values, K = keep of them, rounded down (ties may keep a few more)."""
    count = max(1, math.floor(len(values) * keep + 1e-9))
    return values.kthvalue(len(values) - count + 1).values


def learner_input(sensitivity: Tensor, total: Tensor, whole: bool) -> Tensor:
    """Sum a layer's |g| over inputs, as shares of a total: the input of its mask.

    Args:
        sensitivity: (C, I, k, k) or (C, I), absolute values.
        total: () divisor.
        whole: sum over the kernel too, for layers with a single output position.

    Returns:
        (1, C, k, k); (1, C, 1, 1) for linear layers and with ``whole``.
    """
    summed = sensitivity.flatten(1).sum(1)[:, None, None] if whole or sensitivity.dim() == 2 else sensitivity.sum(1)
    return summed[None] / total


def majority_vote(window: Tensor, raw: bool = False) -> Tensor:
    """Decide a mask from a window: every vector votes for each entry, and half of the votes keep it.

    Args:
        window: (W, C) vectors in (0, 1).
        raw: whether the vectors' mean decides instead.

    Returns:
        (C,) bool; if no entry is kept, the one with the largest mean is.
    """
    votes = window if raw else (window >= KEEP).to(window.dtype)
    mask = votes.mean(0) >= KEEP
    one = torch.zeros_like(mask).index_fill(0, window.mean(0).argmax()[None], True)
    return torch.where(mask.any(), mask, one)


def target_weight(kept: float, target: float) -> float:
    """Compute lambda, the weight of the distance to the target, from the kept share and the target's: 0 below it."""
    return 0.0 if kept < target else PUSH * (kept - target)


def undecided(vector: Tensor) -> bool:
    """Whether less than nine in ten entries of a mask (C,) are outside [0.2, 0.8]."""
    low, high = UNDECIDED
    return float(((vector < low) | (vector > high)).double().mean()) < DECIDED_SHARE


@dataclass(frozen=True)
class Ramp:
    """The factor in front of a mask's sigmoid over a round: linear, one point every ``every`` updates of an epoch.

    Attributes:
        start: first value.
        stop: last value.
        every: updates per point; each epoch begins with a new point.
        epochs: epochs of the round.
        steps: updates per epoch.
        bump: increase of a layer's ramp if its mask stays undecided.
        wait: epochs before the first increase, in points of the ramp.
        points: number of the first point at which an increase may happen; None: by ``wait``.
    """

    start: float
    stop: float
    every: int
    epochs: int
    steps: int
    bump: float
    wait: float = 1.0
    points: int | None = None

    @property
    def length(self) -> int:
        """Number of points: updates of the round / ``every``, rounded down; at least one."""
        return max(1, self.epochs * self.steps // self.every)

    def index(self, update: int) -> int:
        """Number the point at an update, both from 0; the last point stays until the end."""
        epoch, inside = divmod(update, self.steps)
        return min(epoch * -(-self.steps // self.every) + inside // self.every, self.length - 1)

    def value(self, update: int) -> float:
        """Compute the value at an update, without increases."""
        return self.start + (self.stop - self.start) * self.index(update) / max(self.length - 1, 1)

    def open(self, update: int) -> bool:
        """Whether increases may happen at an update."""
        gate = self.wait * self.length / self.epochs if self.points is None else self.points
        return self.index(update) >= gate

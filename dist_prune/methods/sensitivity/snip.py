"""Single-shot sensitivity of filters, the mask that it asks for, and the arithmetic that steers a learned mask. Pure.

Lee, Ajanthan, Torr: SNIP, ICLR 2019 (the sensitivity |W * dL/dW|); Guo et al.: Sensitivity pruner, Pattern Recognition
2023 (filters, target mask, penalty). Shapes: C filters of a layer, I inputs, k x k kernel, W vectors of a window.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

KEEP = 0.5  # a mask's entry from here on counts as kept
UNDECIDED, DECIDED_SHARE = (0.2, 0.8), 0.9
PUSH = 5.0  # weight of the penalty per share that is kept beyond the target
FLOOR = 0.2  # of the share that is asked for: what the fallback leaves of a layer


@torch.no_grad()
def xavier_reinit(network: nn.Module, seed: int, linear: bool = True) -> None:
    """Xavier-normal weights (variance 2 / (inputs + outputs)) for every convolution and linear layer, in place.

    They come from the seed alone, in one draw on the CPU for the whole network: every device draws otherwise.
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
    """Layer -> W * dL/dW of the mean loss over the whole batch, signed, in the shape of its weight.

    ``add`` sums the gradients over ranks as one bucket, the number of images with them: each rank has a part of the
    batch, and the absolute value of a mean is not the mean of absolute values.
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
    """(C,) float64, the sum of a layer's |g| (C, I, k, k) or (C, I) over each filter; ``sensitivity`` may be signed."""
    return torch.linalg.vector_norm(sensitivity.flatten(1), 1, dim=1).double()


def target_masks(
    scores: Mapping[str, Tensor], keep: float, sort: Literal["global", "layer"], few: bool = False
) -> dict[str, Tensor]:
    """Layer -> (C,) bool, the filters that belong to the single-shot target (section 2.2 of the paper).

    Args:
        scores: layer -> (C,) of every layer of the pool.
        keep: share of the filters that are kept, of the pool or, with ``sort`` layer, of each layer.
        few: a layer that would keep fewer than a fifth of that share keeps its best ones up to it; otherwise only a
            layer that would keep none. One filter at least stays.
    """
    if sort == "global":
        limit = _limit(torch.cat(list(scores.values())), keep)
        masks = {name: values >= limit for name, values in scores.items()}
    else:
        masks = {name: values >= _limit(values, keep) for name, values in scores.items()}
    counts = torch.stack([mask.sum() for mask in masks.values()]).tolist()
    for (name, mask), kept in zip(masks.items(), counts, strict=True):
        floor = FLOOR * keep * len(mask)
        if kept == 0 or (few and kept < floor):
            best = scores[name].argsort(descending=True, stable=True)[: max(1, int(floor + 1e-9))]
            masks[name] = torch.zeros_like(mask).index_fill(0, best, True)
    return masks


def _limit(values: Tensor, keep: float) -> Tensor:
    """The K-th largest of the values, K = keep of them, rounded down (ties may keep a few more)."""
    count = max(1, math.floor(len(values) * keep + 1e-9))
    return values.kthvalue(len(values) - count + 1).values


def learner_input(sensitivity: Tensor, total: Tensor, whole: bool) -> Tensor:
    """(1, C, k, k): a layer's |g| (C, I, k, k) or (C, I) summed over inputs, as shares of ``total``.

    ``whole``: summed over the kernel too, (1, C, 1, 1), for layers with a single output position.
    """
    summed = sensitivity.flatten(1).sum(1)[:, None, None] if whole or sensitivity.dim() == 2 else sensitivity.sum(1)
    return summed[None] / total


def majority_vote(window: Tensor, raw: bool = False) -> Tensor:
    """(C,) bool from a window (W, C): every vector votes kept or not, half of the votes keep an entry.

    ``raw``: the vectors' mean decides instead. An empty result keeps the entry with the largest mean.
    """
    votes = window if raw else (window >= KEEP).to(window.dtype)
    mask = votes.mean(0) >= KEEP
    one = torch.zeros_like(mask).index_fill(0, window.mean(0).argmax()[None], True)
    return torch.where(mask.any(), mask, one)


def target_weight(kept: float, asked: float) -> float:
    """Weight of the distance to the target: nothing while less is kept than is asked for."""
    return 0.0 if kept < asked else PUSH * (kept - asked)


def undecided(vector: Tensor) -> bool:
    """Whether less than nine in ten entries lie outside [0.2, 0.8]."""
    low, high = UNDECIDED
    return float(((vector < low) | (vector > high)).double().mean()) < DECIDED_SHARE


@dataclass(frozen=True)
class Ramp:
    """The factor in front of a mask's sigmoid over a round: linear, one point every ``every`` updates of an epoch.

    Attributes:
        start, stop: first and last value.
        every: updates per point; each epoch begins with a new point.
        epochs, steps: epochs of the round, updates per epoch.
        bump: by how much a layer's ramp is raised where its mask stays undecided.
        wait: epochs' worth of points before that may happen.
        points: number of the point from which on it may happen, in place of ``wait``.
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
        """The point in use at an update, both from 0; the last one is held."""
        epoch, inside = divmod(update, self.steps)
        return min(epoch * -(-self.steps // self.every) + inside // self.every, self.length - 1)

    def value(self, update: int) -> float:
        """The point's value, before any bump."""
        return self.start + (self.stop - self.start) * self.index(update) / max(self.length - 1, 1)

    def open(self, update: int) -> bool:
        """Whether bumps may happen."""
        gate = self.wait * self.length / self.epochs if self.points is None else self.points
        return self.index(update) >= gate


# What the released programs do otherwise; each is a quirk of its name.


def raw_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed loss of the score: minus the right class's logit, not normalised over classes."""
    return -logits.gather(1, labels[:, None]).sum()


def as_released_reshape(sensitivity: Tensor) -> Tensor:
    """(C, I, k, k) -> (C, I, k, k) such that its sum over I is the released one: entries of other filters are mixed in.

    The program wants (I, C, k, k) and reshapes where it should transpose; right for one input channel alone.
    """
    out, inputs, *kernel = sensitivity.shape
    return sensitivity.reshape(inputs, out, *kernel).transpose(0, 1)


@torch.no_grad()
def fresh_norms(network: nn.Module) -> None:
    """Scale 1 and shift 0 in every batch norm of the scored copy, in place of the trained ones."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


@torch.no_grad()
def shrink_weights(weights: Sequence[Tensor], factor: float = 0.01) -> float:
    """The connections' mask c of the layers being pruned is 0.01 and not 1: their weights shrink, in place.

    Returns what W c * dL/d(W c) has to be divided by to be dL/dc; where a batch norm makes the network blind to the
    scale, the layer's sensitivities come out a hundred times as large.
    """
    for weight in weights:
        weight.mul_(factor)
    return factor


def padding_32() -> int:
    """Pixels that training images are padded by before they are cropped: 32 stood where 4 was meant."""
    return 32

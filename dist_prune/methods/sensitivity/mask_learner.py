"""A network that learns masks of its channels together with its weights: vectors in (0, 1) scale channels where they
are consumed, a small convolution over the channels' sensitivities makes each vector (Guo et al. 2023)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_prune.methods.sensitivity.snip import Ramp, majority_vote, target_weight, undecided
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
from dist_prune.pruning.hooks.consumers import consumers
from dist_prune.pruning.hooks.gating import gate
from dist_prune.pruning.plan.after_pruning import graph_after
from dist_prune.pruning.plan.plan import Plan


@dataclass(frozen=True)
class MaskRules:
    """What all masks of a round share.

    Attributes:
        ramp: the factor in front of the sigmoid.
        window: updates between two decisions.
        raw: the window's mean decides instead of its votes.
        init: ``wide`` standard deviation 10 sqrt(2 / 9C) and torch's bias; ``he`` sqrt(2 / k^2 C) and bias 0.
    """

    ramp: Ramp
    window: int = 20
    raw: bool = False
    init: Literal["wide", "he"] = "wide"


class Mask(nn.Module):
    """The mask of one group's C channels, and what steers it. Its state lies in buffers, so checkpoints have it."""

    window: Tensor
    kept: Tensor
    weight_of_target: Tensor
    shift: Tensor
    course: Tensor

    def __init__(
        self,
        width: int,
        kernel: tuple[int, ...],
        rules: MaskRules,
        linear: bool,
        generator: torch.Generator,
        dtype: Any,
    ):
        """``kernel``: of the sensitivities, (k, k) or (1, 1); ``linear``: the layer is a linear one."""
        super().__init__()
        inputs = width * math.prod(kernel)
        std = {"wide": 10 * math.sqrt(2 / (9 * width)), "he": math.sqrt(2 / inputs)}[rules.init]
        weight = torch.randn((width, width, *kernel), generator=generator, dtype=torch.float64)
        bias = (2 * torch.rand(width, generator=generator, dtype=torch.float64) - 1) / math.sqrt(inputs)
        self.weight = nn.Parameter((weight * (0.01 if linear and rules.init == "wide" else std)).to(dtype))
        self.bias = nn.Parameter((bias * (rules.init == "wide")).to(dtype))
        self.rules = rules
        self.register_buffer("window", torch.zeros((rules.window, width), dtype=dtype))
        self.register_buffer("kept", torch.ones(width, dtype=dtype))
        self.register_buffer("weight_of_target", torch.tensor(0.1, dtype=torch.float64))
        self.register_buffer("shift", torch.tensor(0.0, dtype=torch.float64))
        rows = max(1, rules.ramp.epochs * rules.ramp.steps // rules.window)
        self.register_buffer("course", torch.zeros((rows, 4), dtype=torch.float64))  # beta, lambda, kept, target
        self.input, self.target = torch.zeros(0), torch.zeros(0)  # of the batch at hand, set before each forward pass
        self.vector = self.kept

    def beta(self, update: int) -> Tensor:
        """() float64, the factor in use, bumps included; on the device, for it is used there at every update."""
        return self.rules.ramp.value(update) + self.shift

    def forward(self, update: int) -> Tensor:
        """(C,) in (0, 1) of the batch at hand; outside training the binary mask."""
        if not self.training:
            return self.kept
        found = (self.weight * self.input).flatten(1).sum(1) + self.bias
        self.vector = torch.sigmoid(self.beta(update).to(found.dtype) * found)
        return self.vector

    def penalty(self) -> Tensor:
        """The mean distance to the target mask, with its weight."""
        return self.weight_of_target.to(self.vector.dtype) * (self.vector - self.target.to(self.vector)).abs().mean()

    @torch.no_grad()
    def note(self, update: int) -> bool:
        """After an update: the vector enters the window; a full window decides. True where it did."""
        rules, vector = self.rules, self.vector.detach()
        row, place = divmod(update, rules.window)
        self.window[place] = vector
        full = place + 1 == rules.window
        if not full and row:
            return False
        self.kept.copy_(majority_vote(self.window[: place + 1], rules.raw))
        kept, asked = self.kept.mean().double(), self.target.double().mean()
        if row < len(self.course):
            self.course[row] = torch.stack([self.beta(update), self.weight_of_target, kept, asked.to(kept)])
        if not full:  # before the first full window the mask is what there is; it steers nothing yet
            return False
        self.weight_of_target.fill_(target_weight(float(kept), float(asked)))
        if rules.ramp.open(update) and undecided(vector):
            self.shift += rules.ramp.bump
        return True


class MaskLearner(nn.Module):
    """``network``, cut by ``plan``, with a mask for each of ``groups``, which the plan has left whole.

    Attributes:
        network: its weights train as well.
        masks: one for each group, in their order.
        updates: updates so far.
    """

    updates: Tensor

    def __init__(
        self,
        network: nn.Module,
        graph: DependencyGraph,
        plan: Plan,
        groups: Sequence[ChannelGroup],
        masks: Sequence[Mask],
    ):
        super().__init__()
        self.network, self.groups = network, tuple(groups)
        self.masks = nn.ModuleList(masks)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        # a positive factor passes ReLU, pools and dropout: to scale what is consumed is to scale after the activation
        small = graph_after(graph, plan)
        self._points = [p for g in groups for p in consumers(small, small.group(g.name), depthwise=True)]
        self._update: int | None = None

    @property
    def update(self) -> int:
        """``updates`` as a number, read from the device once and counted along."""
        if self._update is None:
            self._update = int(self.updates)
        return self._update

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._update = None
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, images: Tensor) -> Tensor:
        vectors = {group.name: mask(self.update) for group, mask in zip(self.groups, self.masks, strict=True)}
        with gate(self.network, self._points, vectors):
            return self.network(images)

    def penalty(self) -> Tensor:
        """The summed penalties of the batch whose forward pass was last."""
        return torch.stack([self.mask(i).penalty() for i in range(len(self.masks))]).sum()

    def mask(self, number: int) -> Mask:
        return self.masks[number]  # type: ignore[return-value]

    def note(self) -> dict[str, float | Tensor]:
        """After an update: let every mask note its vector; figures for trackers where a window was full."""
        figures: dict[str, float | Tensor] = {}
        for number, group in enumerate(self.groups):
            mask = self.mask(number)
            if mask.note(self.update):
                row = mask.course[min(self.update // mask.rules.window, len(mask.course) - 1)].tolist()
                names = ("beta", "lambda", "kept", "target")
                figures |= {f"{group.name}/{name}": value for name, value in zip(names, row, strict=True)}
                figures[f"{group.name}/mask"] = mask.vector.detach()
        self._update = self.update + 1
        self.updates += 1
        return figures

"""A network that learns masks of its channels together with its weights.

Guo et al.: Sensitivity pruner, Pattern Recognition 2023. Vectors in (0, 1) scale channels where they are consumed; a
small convolution over the channels' sensitivities makes each vector.
"""

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
    """Settings that all masks of a round share.

    Attributes:
        ramp: the factor in front of the sigmoid.
        window: updates between two decisions.
        raw: whether the window's mean decides instead of its votes.
        init: ``wide``: standard deviation 10 sqrt(2 / 9C) and torch's bias; ``he``: sqrt(2 / k^2 C) and bias 0.
    """

    ramp: Ramp
    window: int = 20
    raw: bool = False
    init: Literal["wide", "he"] = "wide"


class Mask(nn.Module):
    """The mask of one group's C channels, v = sigmoid(beta (W * S + b)), and the schedule of its penalty.

    S are the sensitivities, the input. The state lies in buffers, so checkpoints have it.

    Attributes:
        window: (updates, C) vectors since the last decision.
        kept: (C,) 0 or 1, the last decision.
        weight_of_target: () float64, lambda, the weight of the penalty.
        shift: () float64, sum of the increases of beta.
        course: (windows, 4) float64, beta, lambda, kept and target share at each decision.
        input: (1, C, k, k) or (1, C, 1, 1) sensitivities of the batch; the caller sets it before each forward pass.
        target: (C,) bool single-shot target of the batch; the caller sets it before each forward pass.
        vector: (C,) the last mask in (0, 1).
    """

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
        """Draw the weights of the mask's convolution.

        Args:
            width: C.
            kernel: of the sensitivities, (k, k) or (1, 1).
            rules: settings of the round.
            linear: whether the layer is linear, or a convolution that works as one.
            generator: on the CPU.
            dtype: of the network's weights.
        """
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
        self.input = torch.zeros(0)
        self.target = torch.zeros(0)
        self.vector = self.kept

    def beta(self, update: int) -> Tensor:
        """Compute the factor at an update, increases included: () float64 on the device."""
        return self.rules.ramp.value(update) + self.shift

    def forward(self, update: int) -> Tensor:
        """Compute the mask of the batch, (C,) in (0, 1); in evaluation mode the binary mask."""
        if not self.training:
            return self.kept
        logits = (self.weight * self.input).flatten(1).sum(1) + self.bias
        self.vector = torch.sigmoid(self.beta(update).to(logits.dtype) * logits)
        return self.vector

    def penalty(self) -> Tensor:
        """Compute lambda times the mean absolute distance to the target mask, () with gradient."""
        return self.weight_of_target.to(self.vector.dtype) * (self.vector - self.target.to(self.vector)).abs().mean()

    @torch.no_grad()
    def note(self, update: int) -> bool:
        """Note the vector after an update; a full window decides.

        Args:
            update: number of the update in the round, from 0.

        Returns:
            Whether the window was full.
        """
        rules, vector = self.rules, self.vector.detach()
        row, position = divmod(update, rules.window)
        self.window[position] = vector
        full = position + 1 == rules.window
        if not full and row:
            return False
        self.kept.copy_(majority_vote(self.window[: position + 1], rules.raw))
        kept = self.kept.mean().double()
        target = self.target.double().mean()
        if row < len(self.course):
            self.course[row] = torch.stack([self.beta(update), self.weight_of_target, kept, target.to(kept)])
        if not full:  # before the first full window the mask is provisional and changes no weight
            return False
        self.weight_of_target.fill_(target_weight(float(kept), float(target)))
        if rules.ramp.open(update) and undecided(vector):
            self.shift += rules.ramp.bump
        return True


class MaskLearner(nn.Module):
    """A network with masks that train together with its weights.

    Attributes:
        network: the pruned network; its weights train as well.
        groups: those that are masked.
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
        """Attach masks to a network.

        Args:
            network: pruned by ``plan``.
            graph: of the dense network.
            plan: it leaves ``groups`` whole.
            groups: those that are masked.
            masks: one for each group, in their order.
        """
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
        """``updates`` as a number, read from the device once and then counted here."""
        if self._update is None:
            self._update = int(self.updates)
        return self._update

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._update = None
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the masked network's logits, (n, classes), of (n, 3, H, W) images."""
        vectors = {group.name: mask(self.update) for group, mask in zip(self.groups, self.masks, strict=True)}
        with gate(self.network, self._points, vectors):
            return self.network(images)

    def penalty(self) -> Tensor:
        """Sum the penalties of the masks for the batch of the last forward pass, () with gradient."""
        return torch.stack([self.mask(i).penalty() for i in range(len(self.masks))]).sum()

    def mask(self, number: int) -> Mask:
        """Return the mask of group ``number``."""
        return self.masks[number]  # type: ignore[return-value]

    def note(self) -> dict[str, float | Tensor]:
        """Let every mask note its vector after an update; return tracker figures of masks whose window was full."""
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

"""Sensitivity Pruner: masks learned next to a single-shot target, group after group, with surgery in between.

Guo, Lai, Yang, Zhao, Shen: Sensitivity pruner: filter-level compression algorithm for deep neural networks, Pattern
Recognition 2023. The target comes from the SNIP sensitivity of a re-initialised copy at full size, at every update.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.errors import PruneError
from dist_prune.methods import method
from dist_prune.pruning import surgeon
from dist_prune.pruning.channels import ChannelGroup, Channels, Layer
from dist_prune.pruning.choose import Request, check_ranking, check_target, fill, keep_best
from dist_prune.pruning.combine import judged
from dist_prune.pruning.learner import Learner, Mask, Rules
from dist_prune.pruning.plan import Plan
from dist_prune.pruning.sensitivity import (
    KEEP,
    Ramp,
    filter_scores,
    fresh_norms,
    learner_input,
    padding_32,
    raw_logits,
    redraw,
    reshape,
    sensitivities,
    small_mask,
    target_masks,
)
from dist_prune.pruning.widen import widened

Beta = Annotated[float, Field(gt=0, le=10**6)]
Quirk = Literal["raw_logits", "reshape", "small_mask", "fresh_norms", "padding_32"]
COURSE = ("beta", "lambda", "kept", "target")


class Options(method.QuirkOptions[Quirk], method.RankingOptions):
    """Names of the released programs' flags stand in the recipes' headers."""

    keep: float = Field(default=0.4, gt=0, le=1, description="share of the filters in the single-shot target")
    sort: Literal["global", "layer"] = Field(default="global", description="the target over the pool, or per layer")
    pool: Literal["prunable", "layers", "kind"] = Field(
        default="prunable", description="what is scored: what may be cut, every conv and linear layer, those of a kind"
    )
    fallback: Literal["empty", "few"] = Field(
        default="empty", description="layers that get a fifth of keep: those with no filter in the target, with fewer"
    )
    total: Literal["pool", "layer"] = Field(default="pool", description="sensitivities are shares of this sum")
    redraw_linear: bool = Field(default=True, description="linear layers of the scored copy are drawn anew as well")
    by: Literal["stage", "layer", "all"] = Field(default="stage", description="the groups of one round")
    rounds: str | None = Field(
        default=None, pattern=r"^\d{1,6}(-\d{1,6})?$", description="only these: 3, or 3-5; from 1"
    )
    skip: tuple[str, ...] = Field(default=(), description="globs of layers whose groups stay whole")
    epochs: int = Field(default=4, ge=1, le=10**6, description="of each round")
    batch: int = Field(default=64, ge=2, le=10**6, description="global batch")
    lr: float = Field(default=1e-3, gt=0, le=10**6)
    decay_every: int = Field(default=2, ge=1, le=10**6, description="epochs between two divisions of the rate by 10")
    weight_decay: float = Field(default=5e-4, ge=0, le=1000)
    holdout: float = Field(default=0.1, ge=0, lt=0.9, description="images that choose a round's epoch; 0: the last")
    beta: tuple[Beta, Beta] = Field(default=(1.0, 100.0), description="ramp of the factor in the masks' sigmoids")
    beta_every: int = Field(default=100, ge=1, le=10**9, description="updates per point of the ramp")
    bump: float = Field(default=1.0, ge=0, le=10**6, description="what an undecided mask's ramp is raised by")
    bump_epochs: float = Field(default=1.0, ge=0, le=10**6, description="not before so many epochs' points")
    bump_points: int | None = Field(default=None, ge=0, le=10**9, description="or so many points")
    window: int = Field(default=20, ge=1, le=10**9, description="updates between two decisions of a mask")
    vote: Literal["binary", "mean"] = Field(default="binary", description="what a window averages: decisions, values")
    init: Literal["wide", "he"] = Field(default="wide", description="weights of the mask's convolution")


class Sensitivity(method.Ranking):
    """How many filters stay falls out of the learned masks; a target or keep ratio ranks by them instead."""

    paper = "Guo et al., Sensitivity pruner, Pattern Recognition 2023"
    Options = Options
    equivariant = False  # a mask's convolution starts from random weights
    trains_weights = True
    one_shot = "its masks and weights are learned together, in rounds of its own (method.rounds)"

    def limits(self, channels: Channels) -> Channels:
        """Residual streams stay whole: masks are for layers inside blocks."""
        channels = super().limits(channels)

        def reason(group: ChannelGroup) -> str:
            if any(fnmatchcase(name, glob) for name in group.producers for glob in self.options.skip):
                return "method.skip"
            return "a residual stream: several layers write into it" if len(group.producers) > 1 else ""

        return judged(channels, reason)

    def check(self, channels: Channels, request: Request) -> None:
        if request.threshold is not None or (request.target is not None and request.keep_ratio is not None):
            raise PruneError(
                "sensitivity: the masks are learned (method.keep steers them). Leave select and target empty to take "
                "them as they are, or set one of target and select.keep_ratio to rank channels by them"
            )
        check_target(channels, request)
        if unknown := channels.unmatched(self.options.skip):
            raise PruneError(f"method.skip: {', '.join(unknown)} match no layer whose channels could be cut")
        self.chosen(channels)

    def ready(self, channels: Channels, exclude: Sequence[str], request: Request) -> Channels:
        if exclude:
            raise PruneError("select.exclude: masks are learned while scoring, so groups are left out by method.skip")
        return super().ready(channels, exclude, request)

    def rounds(self, channels: Channels) -> list[tuple[ChannelGroup, ...]]:
        """The free groups, round by round, in the order of the layers."""
        found: dict[str, list[ChannelGroup]] = {}
        for group in channels.free:
            key = {"layer": group.name, "all": "", "stage": stage_of(group.name)}[self.options.by]
            found.setdefault(key, []).append(group)
        return [tuple(groups) for groups in found.values()]

    def chosen(self, channels: Channels) -> list[tuple[int, tuple[ChannelGroup, ...]]]:
        """(number from 1, groups) of the rounds that ``rounds`` names."""
        numbered, asked = list(enumerate(self.rounds(channels), start=1)), self.options.rounds
        if asked is None:
            return numbered
        first, _, last = asked.partition("-")
        low, high = int(first), int(last or first)
        if not 1 <= low <= high <= len(numbered):
            raise PruneError(f"method.rounds: {asked} lies outside the rounds of this network, 1-{len(numbered)}")
        return numbered[low - 1 : high]

    def score(self, bench: method.Bench) -> method.Scores:
        """Per group ``<group>:mask`` (C,) int64 kept or not, ``<group>:soft`` (C,) float64 mean of the last window,
        ``<group>:course`` (windows, 4) float64 beta, lambda, kept and target share until the kept epoch; ``round
        <n>:figures`` (2,) best held-out top-1, last training loss; ``trained/<name>`` the trained dense state dict."""
        channels = self.limits(bench.channels)
        dense = bench.network()
        weights = {name: tensor.cpu().clone() for name, tensor in dense.state_dict().items()}
        plan = Plan({}, {group.name: group.width for group in channels.groups})
        scores: method.Scores = {}
        for number, groups in self.chosen(channels):
            dense.load_state_dict(weights)
            small = bench.network()
            small.load_state_dict(weights)
            surgeon.operate(small, channels, plan)
            learner, history = self._learned(bench, channels, plan, small, groups, number)
            weights = widened(weights, learner.network.state_dict(), channels, plan)
            gone = {}
            for group, mask in zip(groups, learner.masks, strict=True):
                found = outcome(mask)  # type: ignore[arg-type]
                scores |= {f"{group.name}:{key}": table for key, table in found.items()}
                gone[group.name] = tuple((found["mask"] == 0).nonzero().flatten().tolist())
            plan = plan.then(Plan({name: cut for name, cut in gone.items() if cut}, plan.counts))
            best = max(line.get("holdout_top1", -1.0) for line in history)
            scores[f"round {number}:figures"] = torch.tensor([best, history[-1]["loss"]], dtype=torch.float64)
        return scores | {method.TRAINED + name: tensor for name, tensor in weights.items()}

    def _learned(
        self, bench: method.Bench, channels: Channels, plan: Plan, small: nn.Module, groups: Sequence[ChannelGroup],
        number: int,
    ) -> tuple[Learner, list[dict[str, float]]]:  # fmt: skip
        """Weights of ``small`` (cut by ``plan``) and masks of ``groups``, trained together for one round."""
        options, shot = self.options, Shot(self, bench, channels, groups, number)
        steps = bench.steps(options.batch, options.holdout)
        ramp = Ramp(
            start=options.beta[0], stop=options.beta[1], every=options.beta_every, epochs=options.epochs, steps=steps,
            bump=options.bump, wait=options.bump_epochs, points=options.bump_points,
        )  # fmt: skip
        rules = Rules(ramp, options.window, options.vote == "mean", options.init)
        masks = []
        for group in groups:
            weight, layer = shot.weights[group.name], channels.layers[group.name]
            kernel = (1, 1) if pointlike(layer) else tuple(weight.shape[2:])
            generator = bench.draw("sensitivity", "mask", group.name)
            masks.append(Mask(group.width, kernel, rules, pointlike(layer), generator, weight.dtype))
        learner = Learner(small, channels, plan, groups, masks).to(next(small.parameters()).device)

        def loss(forward: nn.Module, images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
            inputs, targets = shot.take(images, labels, learner.update)
            for group, mask in zip(groups, masks, strict=True):
                mask.input, mask.target = inputs[group.name], targets[group.name]
            logits = forward(images)
            return functional.cross_entropy(logits, labels, reduction="none") + learner.penalty()

        history = bench.fit(
            (), loss, options.epochs, options.lr, options.batch, lambda step: learner.note(), network=learner,
            name=f"round_{number}", padding=padding_32() if self.has("padding_32") else None,
            weight_decay=options.weight_decay, decay_norm_bias=True, schedule="step", step_size=options.decay_every,
            selection="holdout" if options.holdout else "last", holdout=options.holdout or 0.1,
        )  # fmt: skip
        return learner, history

    def select(self, scores: Mapping[str, Tensor], channels: Channels, request: Request) -> Plan:
        channels = self.limits(channels)
        self.check(channels, request)
        left_alone = {
            group.name: "it belongs to no round of method.rounds"
            for group in channels.free
            if group.name not in {g.name for _, groups in self.chosen(channels) for g in groups}
        }
        free = replace(
            channels,
            groups=tuple(replace(g, protected=g.protected or left_alone.get(g.name, "")) for g in channels.groups),
        )
        masks = {group.name: self.need(scores, f"{group.name}:mask") for group in free.free}
        worth = self.worth(scores, channels)
        if request.target is None and request.keep_ratio is None:
            learned = {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}
            kept = fill(free, request, learned, worth)
        else:
            check_ranking(request)
            kept = keep_best(free, worth, request, self.options.normalise)
        return Plan.keeping(free, kept, dict.fromkeys(masks, "its mask kept every channel"))

    def worth(self, scores: Mapping[str, Tensor], channels: Channels) -> dict[str, Tensor]:
        """Channels that a mask keeps are above those that it cuts; among them the mean of the soft mask decides."""
        return {
            group.name: self.need(scores, f"{group.name}:mask").double() + self.need(scores, f"{group.name}:soft")
            for _, groups in self.chosen(self.limits(channels))
            for group in groups
        }

    def table(self, scores: Mapping[str, Tensor], channels: Channels, request: Request) -> list[dict[str, Any]]:
        """Of every round, means over its groups at the last window, and the held-out accuracy of the kept epoch."""
        rows = []
        for number, groups in self.chosen(self.limits(channels)):
            lines = [self.need(scores, f"{group.name}:course") for group in groups]
            last = torch.stack([line[-1] for line in lines]).mean(0).tolist()
            top1, loss = self.need(scores, f"round {number}:figures").tolist()
            figures = {"held_out_top1": top1} if top1 >= 0 else {}
            rows.append({"round": number, **dict(zip(COURSE, last, strict=True)), "loss": loss, **figures})
        return rows


class Shot:
    """The single-shot score of a round: a re-initialised copy of the dense network, one pass per update."""

    def __init__(
        self, paper: Sensitivity, bench: method.Bench, channels: Channels, groups: Sequence[ChannelGroup], number: int
    ):
        self._paper, self._bench, self._number = paper, bench, number
        self._channels, self._names = channels, [group.name for group in groups]
        self._copy = bench.network().train().requires_grad_(False)
        if paper.has("fresh_norms"):
            fresh_norms(self._copy)
        self.weights: dict[str, Tensor] = {}
        for name in self._scored():
            self.weights[name] = self._copy.get_parameter(f"{name}.weight").requires_grad_(True)

    def _scored(self) -> Iterable[str]:
        """The layers that the target or a share of the sensitivity needs."""
        options, layers = self._paper.options, self._channels.layers
        if options.sort == "layer" and options.total == "layer":
            return self._names
        if options.pool == "prunable":
            return [group.name for group in self._channels.free]
        kinds = ("conv", "linear") if options.pool == "layers" else (layers[self._names[0]].kind,)
        return [name for name, layer in layers.items() if layer.kind in kinds and not layer.depthwise]

    def take(self, images: Tensor, labels: Tensor, update: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(input of each group's mask, its target mask) for the batch that ``images`` is this rank's part of."""
        paper, options = self._paper, self._paper.options
        seed = self._bench.draw("sensitivity", "weights", self._number, update).initial_seed()
        redraw(self._copy, seed, options.redraw_linear)
        mask = small_mask([self.weights[name] for name in self._names]) if paper.has("small_mask") else 1.0
        found = sensitivities(self._bench.sum, self._copy, self.weights, images, labels, self._loss())
        found |= {name: found[name] / mask for name in self._names}
        scores = {name: filter_scores(value) for name, value in found.items()}
        pool = scores if options.sort == "global" else {name: scores[name] for name in self._names}
        targets = target_masks(pool, options.keep, options.sort, options.fallback == "few")
        whole = torch.stack([value.sum() for value in scores.values()]).sum()
        inputs = {}
        for name in self._names:
            value = found[name]
            if paper.has("reshape") and value.dim() == 4:
                value = reshape(value)
            total = whole if options.total == "pool" else scores[name].sum()
            inputs[name] = learner_input(value.abs(), total.to(value.dtype), pointlike(self._channels.layers[name]))
        return inputs, {name: targets[name] for name in self._names}

    def _loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        if self._paper.has("raw_logits"):
            return raw_logits
        return lambda logits, labels: functional.cross_entropy(logits, labels, reduction="sum")


def outcome(mask: Mask) -> dict[str, Tensor]:
    """What a trained mask leaves in the score file."""
    seen = mask.window[mask.window.abs().sum(1) > 0]
    return {
        "mask": (mask.kept >= KEEP).long().cpu(),
        "soft": seen.double().mean(0).cpu(),
        "course": mask.course[mask.course.any(1)].cpu(),
    }


def pointlike(layer: Layer) -> bool:
    """A linear layer, or a convolution that works as one: its mask looks at whole filters."""
    return layer.kind == "linear" or layer.positions == 1


def stage_of(layer: str) -> str:
    """What stands before the last number in a layer's path; its first part where there is none before it."""
    found = re.match(r"(.+)\.\d+(?:\..*)?$", layer)
    return found[1] if found else layer.partition(".")[0]

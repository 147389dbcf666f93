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
from dist_prune.methods import base
from dist_prune.methods.sensitivity.mask_learner import Mask, MaskLearner, MaskRules
from dist_prune.methods.sensitivity.restore_width import restore_width
from dist_prune.methods.sensitivity.snip import (
    KEEP,
    Ramp,
    as_released_reshape,
    filter_scores,
    fresh_norms,
    learner_input,
    padding_32,
    raw_logits,
    sensitivities,
    shrink_weights,
    target_masks,
    xavier_reinit,
)
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph, Layer
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.selection.group_scores import protect
from dist_prune.pruning.selection.ranking import (
    SelectionRequest,
    check_ranking,
    check_target,
    refill_to_floor,
    select_by_score,
)
from dist_prune.pruning.surgery import surgeon

Beta = Annotated[float, Field(gt=0, le=10**6)]
Quirk = Literal["raw_logits", "reshape", "small_mask", "fresh_norms", "padding_32"]
COURSE = ("beta", "lambda", "kept", "target")


class Options(base.QuirkOptions[Quirk], base.RankingOptions):
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


class Sensitivity(base.RankingMethod):
    """How many filters stay falls out of the learned masks; a target or keep ratio ranks by them instead."""

    paper = "Guo et al., Sensitivity pruner, Pattern Recognition 2023"
    Options = Options
    equivariant = False  # a mask's convolution starts from random weights
    trains_weights = True
    why_one_shot = "its masks and weights are learned together, in rounds of its own (method.rounds)"

    def prunable(self, graph: DependencyGraph) -> DependencyGraph:
        """Residual streams stay whole: masks are for layers inside blocks."""
        graph = super().prunable(graph)

        def reason(group: ChannelGroup) -> str:
            if any(fnmatchcase(name, glob) for name in group.producers for glob in self.options.skip):
                return "method.skip"
            return "a residual stream: several layers write into it" if len(group.producers) > 1 else ""

        return protect(graph, reason)

    def check(self, graph: DependencyGraph, request: SelectionRequest) -> None:
        if request.threshold is not None or (request.target is not None and request.keep_ratio is not None):
            raise PruneError(
                "sensitivity: the masks are learned (method.keep steers them). Leave select and target empty to take "
                "them as they are, or set one of target and select.keep_ratio to rank channels by them"
            )
        check_target(graph, request)
        if unknown := graph.unmatched(self.options.skip):
            raise PruneError(f"method.skip: {', '.join(unknown)} match no layer whose channels could be cut")
        self.selected_rounds(graph)

    def prepare(self, graph: DependencyGraph, exclude: Sequence[str], request: SelectionRequest) -> DependencyGraph:
        if exclude:
            raise PruneError("select.exclude: masks are learned while scoring, so groups are left out by method.skip")
        return super().prepare(graph, exclude, request)

    def rounds(self, graph: DependencyGraph) -> list[tuple[ChannelGroup, ...]]:
        """The free groups, round by round, in the order of the layers."""
        found: dict[str, list[ChannelGroup]] = {}
        for group in graph.free:
            key = {"layer": group.name, "all": "", "stage": stage_name(group.name)}[self.options.by]
            found.setdefault(key, []).append(group)
        return [tuple(groups) for groups in found.values()]

    def selected_rounds(self, graph: DependencyGraph) -> list[tuple[int, tuple[ChannelGroup, ...]]]:
        """(number from 1, groups) of the rounds that ``rounds`` names."""
        numbered, asked = list(enumerate(self.rounds(graph), start=1)), self.options.rounds
        if asked is None:
            return numbered
        first, _, last = asked.partition("-")
        low, high = int(first), int(last or first)
        if not 1 <= low <= high <= len(numbered):
            raise PruneError(f"method.rounds: {asked} lies outside the rounds of this network, 1-{len(numbered)}")
        return numbered[low - 1 : high]

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Per group ``<group>:mask`` (C,) int64 kept or not, ``<group>:soft`` (C,) float64 mean of the last window,
        ``<group>:course`` (windows, 4) float64 beta, lambda, kept and target share until the kept epoch; ``round
        <n>:figures`` (2,) best held-out top-1, last training loss; ``trained/<name>`` the trained dense state dict."""
        graph = self.prunable(context.graph)
        dense = context.clone_model()
        weights = {name: tensor.cpu().clone() for name, tensor in dense.state_dict().items()}
        plan = Plan({}, {group.name: group.width for group in graph.groups})
        scores: base.Scores = {}
        for number, groups in self.selected_rounds(graph):
            dense.load_state_dict(weights)
            small = context.clone_model()
            small.load_state_dict(weights)
            surgeon.apply_plan(small, graph, plan)
            learner, history = self._learned(context, graph, plan, small, groups, number)
            weights = restore_width(weights, learner.network.state_dict(), graph, plan)
            gone = {}
            for group, mask in zip(groups, learner.masks, strict=True):
                found = mask_result(mask)  # type: ignore[arg-type]
                scores |= {f"{group.name}:{key}": table for key, table in found.items()}
                gone[group.name] = tuple((found["mask"] == 0).nonzero().flatten().tolist())
            plan = plan.then(Plan({name: cut for name, cut in gone.items() if cut}, plan.counts))
            best = max(line.get("holdout_top1", -1.0) for line in history)
            scores[f"round {number}:figures"] = torch.tensor([best, history[-1]["loss"]], dtype=torch.float64)
        return scores | {base.TRAINED + name: tensor for name, tensor in weights.items()}

    def _learned(
        self,
        context: base.ScoringContext,
        graph: DependencyGraph,
        plan: Plan,
        small: nn.Module,
        groups: Sequence[ChannelGroup],
        number: int,
    ) -> tuple[MaskLearner, list[dict[str, float]]]:
        """Weights of ``small`` (cut by ``plan``) and masks of ``groups``, trained together for one round."""
        options, shot = self.options, Shot(self, context, graph, groups, number)
        steps = context.steps_per_epoch(options.batch, options.holdout)
        ramp = Ramp(
            start=options.beta[0], stop=options.beta[1], every=options.beta_every, epochs=options.epochs, steps=steps,
            bump=options.bump, wait=options.bump_epochs, points=options.bump_points,
        )  # fmt: skip
        rules = MaskRules(ramp, options.window, options.vote == "mean", options.init)
        masks = []
        for group in groups:
            weight, layer = shot.weights[group.name], graph.layers[group.name]
            kernel = (1, 1) if is_pointwise(layer) else tuple(weight.shape[2:])
            generator = context.generator("sensitivity", "mask", group.name)
            masks.append(Mask(group.width, kernel, rules, is_pointwise(layer), generator, weight.dtype))
        learner = MaskLearner(small, graph, plan, groups, masks).to(next(small.parameters()).device)

        def loss(forward: nn.Module, images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
            inputs, targets = shot.take(images, labels, learner.update)
            for group, mask in zip(groups, masks, strict=True):
                mask.input, mask.target = inputs[group.name], targets[group.name]
            logits = forward(images)
            return functional.cross_entropy(logits, labels, reduction="none") + learner.penalty()

        history = context.train_model(
            learner, loss, options.epochs, options.lr, options.batch, lambda step: learner.note(),
            name=f"round_{number}", padding=padding_32() if self.has("padding_32") else None,
            weight_decay=options.weight_decay, decay_norm_bias=True, schedule="step", step_size=options.decay_every,
            selection="holdout" if options.holdout else "last", holdout=options.holdout or 0.1,
        )  # fmt: skip
        return learner, history

    def select(self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest) -> Plan:
        graph = self.prunable(graph)
        self.check(graph, request)
        left_alone = {
            group.name: "it belongs to no round of method.rounds"
            for group in graph.free
            if group.name not in {g.name for _, groups in self.selected_rounds(graph) for g in groups}
        }
        free = replace(
            graph,
            groups=tuple(replace(g, protected=g.protected or left_alone.get(g.name, "")) for g in graph.groups),
        )
        masks = {group.name: self.require_score(scores, f"{group.name}:mask") for group in free.free}
        worth = self.importance(scores, graph)
        if request.target is None and request.keep_ratio is None:
            learned = {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}
            kept = refill_to_floor(free, request, learned, worth)
        else:
            check_ranking(request)
            kept = select_by_score(free, worth, request, self.options.normalise)
        return Plan.from_kept(free, kept, dict.fromkeys(masks, "its mask kept every channel"))

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        """Channels that a mask keeps are above those that it cuts; among them the mean of the soft mask decides."""
        return {
            group.name: self.require_score(scores, f"{group.name}:mask").double()
            + self.require_score(scores, f"{group.name}:soft")
            for _, groups in self.selected_rounds(self.prunable(graph))
            for group in groups
        }

    def table(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> list[dict[str, Any]]:
        """Of every round, means over its groups at the last window, and the held-out accuracy of the kept epoch."""
        rows = []
        for number, groups in self.selected_rounds(self.prunable(graph)):
            lines = [self.require_score(scores, f"{group.name}:course") for group in groups]
            last = torch.stack([line[-1] for line in lines]).mean(0).tolist()
            top1, loss = self.require_score(scores, f"round {number}:figures").tolist()
            figures = {"held_out_top1": top1} if top1 >= 0 else {}
            rows.append({"round": number, **dict(zip(COURSE, last, strict=True)), "loss": loss, **figures})
        return rows


class Shot:
    """The single-shot score of a round: a re-initialised copy of the dense network, one pass per update."""

    def __init__(
        self,
        paper: Sensitivity,
        context: base.ScoringContext,
        graph: DependencyGraph,
        groups: Sequence[ChannelGroup],
        number: int,
    ):
        self._paper, self._bench, self._number = paper, context, number
        self._channels, self._names = graph, [group.name for group in groups]
        self._copy = context.clone_model().train().requires_grad_(False)
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
        seed = self._bench.generator("sensitivity", "weights", self._number, update).initial_seed()
        xavier_reinit(self._copy, seed, options.redraw_linear)
        mask = shrink_weights([self.weights[name] for name in self._names]) if paper.has("small_mask") else 1.0
        found = sensitivities(self._bench.all_reduce_sum_, self._copy, self.weights, images, labels, self._loss())
        found |= {name: found[name] / mask for name in self._names}
        scores = {name: filter_scores(value) for name, value in found.items()}
        pool = scores if options.sort == "global" else {name: scores[name] for name in self._names}
        targets = target_masks(pool, options.keep, options.sort, options.fallback == "few")
        whole = torch.stack([value.sum() for value in scores.values()]).sum()
        inputs = {}
        for name in self._names:
            value = found[name]
            if paper.has("reshape") and value.dim() == 4:
                value = as_released_reshape(value)
            total = whole if options.total == "pool" else scores[name].sum()
            inputs[name] = learner_input(value.abs(), total.to(value.dtype), is_pointwise(self._channels.layers[name]))
        return inputs, {name: targets[name] for name in self._names}

    def _loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        if self._paper.has("raw_logits"):
            return raw_logits
        return lambda logits, labels: functional.cross_entropy(logits, labels, reduction="sum")


def mask_result(mask: Mask) -> dict[str, Tensor]:
    """What a trained mask leaves in the score file."""
    seen = mask.window[mask.window.abs().sum(1) > 0]
    return {
        "mask": (mask.kept >= KEEP).long().cpu(),
        "soft": seen.double().mean(0).cpu(),
        "course": mask.course[mask.course.any(1)].cpu(),
    }


def is_pointwise(layer: Layer) -> bool:
    """A linear layer, or a convolution that works as one: its mask looks at whole filters."""
    return layer.kind == "linear" or layer.positions == 1


def stage_name(layer: str) -> str:
    """What stands before the last number in a layer's path; its first part where there is none before it."""
    found = re.match(r"(.+)\.\d+(?:\..*)?$", layer)
    return found[1] if found else layer.partition(".")[0]

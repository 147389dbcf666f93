"""The method Sensitivity Pruner: rounds of mask learning with surgery in between, and the plan of the learned masks.

Guo, Lai, Yang, Zhao, Shen: Sensitivity pruner: filter-level compression algorithm for deep neural networks, Pattern
Recognition 2023. At every update the target comes from the SNIP sensitivity of a re-initialised copy of full size.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.errors import PruneError
from dist_prune.methods import base
from dist_prune.methods.needs import Needs
from dist_prune.methods.sensitivity import quirks
from dist_prune.methods.sensitivity.mask_learner import Mask, MaskLearner, MaskRules
from dist_prune.methods.sensitivity.options import Options
from dist_prune.methods.sensitivity.restore_width import restore_width
from dist_prune.methods.sensitivity.single_shot import SingleShotScore, is_pointwise
from dist_prune.methods.sensitivity.snip import KEEP, Ramp
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph
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

COURSE = ("beta", "lambda", "kept", "target")  # columns of a group's course in the score file


class Sensitivity(base.RankingMethod):
    """Removes the filters that learned masks cut; a target or a keep ratio ranks filters by the masks instead."""

    paper = "Guo et al., Sensitivity pruner, Pattern Recognition 2023"
    needs = Needs(
        labels=True, gradients=True, training=True, forward=None, backward=None, note="epochs of training masks"
    )
    task_needs = ("class labels", "class logits")
    Options = Options
    equivariant = False  # a mask's convolution starts from random weights
    trains_weights = True
    why_one_shot = "its masks and weights are learned together, in rounds of its own (method.rounds)"

    def prunable(self, graph: DependencyGraph) -> DependencyGraph:
        """Protect residual streams and skipped layers: masks are for layers inside blocks."""
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
        """List the free groups of each round, in the order of the layers."""
        rounds: dict[str, list[ChannelGroup]] = {}
        for group in graph.free:
            key = {"layer": group.name, "all": "", "stage": stage_name(group.name)}[self.options.by]
            rounds.setdefault(key, []).append(group)
        return [tuple(groups) for groups in rounds.values()]

    def selected_rounds(self, graph: DependencyGraph) -> list[tuple[int, tuple[ChannelGroup, ...]]]:
        """List (number from 1, groups) of the rounds that ``method.rounds`` names.

        Raises:
            PruneError: the network has no such rounds.
        """
        numbered = list(enumerate(self.rounds(graph), start=1))
        span = self.options.rounds
        if span is None:
            return numbered
        first, _, last = span.partition("-")
        low = int(first)
        high = int(last or first)
        if not 1 <= low <= high <= len(numbered):
            raise PruneError(f"method.rounds: {span} lies outside the rounds of this network, 1-{len(numbered)}")
        return numbered[low - 1 : high]

    def score(self, context: base.ScoringContext) -> base.Scores:
        """Learn the masks of all rounds.

        Returns:
            For each group ``<group>:mask``, (C,) int64, 1 for kept channels; ``<group>:soft``, (C,) float64, the mean
            of the last window; ``<group>:course``, (windows, 4) float64, beta, lambda, kept and target share after each
            window until the kept epoch. For each round ``round <n>:figures``, (2,) float64, the best held-out top-1 in
            percent (-1: none) and the last training loss. ``trained/<name>``, the trained dense state dict.
        """
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
            learner, history = self._learn(context, graph, plan, small, groups, number)
            weights = restore_width(weights, learner.network.state_dict(), graph, plan)
            removed = {}
            for group, mask in zip(groups, learner.masks, strict=True):
                result = mask_result(mask)  # type: ignore[arg-type]
                scores |= {f"{group.name}:{key}": table for key, table in result.items()}
                removed[group.name] = tuple((result["mask"] == 0).nonzero().flatten().tolist())
            plan = plan.then(Plan({name: cut for name, cut in removed.items() if cut}, plan.groups_kept))
            best = max(epoch.get("holdout_top1", -1.0) for epoch in history)
            scores[f"round {number}:figures"] = torch.tensor([best, history[-1]["loss"]], dtype=torch.float64)
        return scores | {base.TRAINED + name: tensor for name, tensor in weights.items()}

    def _learn(
        self,
        context: base.ScoringContext,
        graph: DependencyGraph,
        plan: Plan,
        small: nn.Module,
        groups: Sequence[ChannelGroup],
        number: int,
    ) -> tuple[MaskLearner, list[dict[str, float]]]:
        """Weights of ``small`` (cut by ``plan``) and masks of ``groups``, trained together for one round."""
        options = self.options
        single_shot = SingleShotScore(options, context, graph, groups, number)
        steps = context.steps_per_epoch(options.batch, options.holdout)
        ramp = Ramp(
            start=options.beta[0],
            stop=options.beta[1],
            every=options.beta_every,
            epochs=options.epochs,
            steps=steps,
            bump=options.bump,
            wait=options.bump_epochs,
            points=options.bump_points,
        )
        rules = MaskRules(ramp, options.window, options.vote == "mean", options.init)
        masks = []
        for group in groups:
            weight, layer = single_shot.weights[group.name], graph.layers[group.name]
            kernel = (1, 1) if is_pointwise(layer) else tuple(weight.shape[2:])
            generator = context.generator("sensitivity", "mask", group.name)
            masks.append(Mask(group.width, kernel, rules, is_pointwise(layer), generator, weight.dtype))
        learner = MaskLearner(small, graph, plan, groups, masks).to(next(small.parameters()).device)

        def loss(forward: nn.Module, images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
            inputs, targets = single_shot.compute(images, labels, learner.update)
            for group, mask in zip(groups, masks, strict=True):
                mask.input, mask.target = inputs[group.name], targets[group.name]
            logits = forward(images)
            return functional.cross_entropy(logits, labels, reduction="none") + learner.penalty()

        history = context.train_model(
            learner, loss, options.epochs, options.lr, options.batch, lambda step: learner.note(),
            name=f"round_{number}", padding=quirks.padding_32() if self.has("padding_32") else None,
            weight_decay=options.weight_decay, decay_norm_bias=True, schedule="step", step_size=options.decay_every,
            selection="holdout" if options.holdout else "last", holdout=options.holdout or 0.1,
        )  # fmt: skip
        return learner, history

    def select(self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest) -> Plan:
        graph = self.prunable(graph)
        self.check(graph, request)
        not_learned = {
            group.name: "it belongs to no round of method.rounds"
            for group in graph.free
            if group.name not in {g.name for _, groups in self.selected_rounds(graph) for g in groups}
        }
        free = replace(
            graph,
            groups=tuple(replace(g, protected=g.protected or not_learned.get(g.name, "")) for g in graph.groups),
        )
        masks = {group.name: self.require_score(scores, f"{group.name}:mask") for group in free.free}
        importance = self.importance(scores, graph)
        if request.target is None and request.keep_ratio is None:
            learned = {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}
            kept = refill_to_floor(free, request, learned, importance)
        else:
            check_ranking(request)
            kept = select_by_score(free, importance, request, self.options.normalise)
        return Plan.from_kept(free, kept, dict.fromkeys(masks, "its mask kept every channel"))

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        """Rank channels by hard plus soft mask: groups of the rounds -> (C,) float64.

        Channels that a mask keeps are above those that it cuts; within both, the mean of the soft mask decides.
        """
        return {
            group.name: self.require_score(scores, f"{group.name}:mask").double()
            + self.require_score(scores, f"{group.name}:soft")
            for _, groups in self.selected_rounds(self.prunable(graph))
            for group in groups
        }

    def table(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> list[dict[str, Any]]:
        """List each round's means over groups at the last window, its loss and the kept epoch's held-out top-1."""
        rows = []
        for number, groups in self.selected_rounds(self.prunable(graph)):
            courses = [self.require_score(scores, f"{group.name}:course") for group in groups]
            last = torch.stack([course[-1] for course in courses]).mean(0).tolist()
            top1, loss = self.require_score(scores, f"round {number}:figures").tolist()
            figures = {"held_out_top1": top1} if top1 >= 0 else {}
            rows.append({"round": number, **dict(zip(COURSE, last, strict=True)), "loss": loss, **figures})
        return rows


def mask_result(mask: Mask) -> dict[str, Tensor]:
    """Collect the entries of a trained mask for the score file: ``mask``, ``soft`` and ``course``; see ``score``."""
    filled = mask.window[mask.window.abs().sum(1) > 0]
    return {
        "mask": (mask.kept >= KEEP).long().cpu(),
        "soft": filled.double().mean(0).cpu(),
        "course": mask.course[mask.course.any(1)].cpu(),
    }


def stage_name(layer: str) -> str:
    """Name a layer's stage: its path before the last number, or its first part if nothing precedes a number."""
    match = re.match(r"(.+)\.\d+(?:\..*)?$", layer)
    return match[1] if match else layer.partition(".")[0]

"""Dirichlet switches: channels times a vector on the simplex, whose posterior is trained with the weights frozen.

Adamczewski, Park: Dirichlet Pruning for Neural Network Compression, AISTATS 2021. One layer at a time: s ~ q(s) =
Dir(phi), phi = softplus(v), prior Dir(alpha); the loss is the negative evidence bound; a channel's worth is its
posterior mean.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.errors import PruneError
from dist_prune.methods import base
from dist_prune.methods.dirichlet.posteriors import (
    Dirichlet,
    LogisticNormal,
    Posterior,
    correlation,
    dirichlet_kl,
    log_mean,
    moments,
)
from dist_prune.pruning.figure_data import SimilarityMap
from dist_prune.pruning.graph.groups import DependencyGraph, HookPoint
from dist_prune.pruning.hooks.activations import pooled_norm
from dist_prune.pruning.hooks.capture import capture_outputs
from dist_prune.pruning.hooks.gating import Where, gate, gate_points
from dist_prune.pruning.hooks.split_forward import SplitForward, fx_steps, repeat_batch
from dist_prune.pruning.selection.ranking import SelectionRequest

Quirk = Literal["batch_statistics", "mixed_images", "dropout", "kl_at_mean", "reversed_ranking"]
DROPPED = 0.5  # share, quirk dropout


class Options(base.QuirkOptions[Quirk], base.RankingOptions):
    """Gates train on the calibration images (``score.images: all`` for the papers' whole training set), with the
    recipe's training augmentation. The released nets: ``kl_weight=0``, ``scale=simplex``, ``place=output`` (ResNet-56:
    consumed)."""

    released = ("batch_statistics", "mixed_images", "dropout")

    variant: Literal["point", "integral"] = Field(default="point", description="the posterior's mean, or draws from it")
    posterior: Literal["dirichlet", "logistic_normal"] = Field(
        default="dirichlet", description="logistic_normal can let channels rise together; needs variant=integral"
    )
    place: Where = Field(default="consumed", description="switch what the next layers read, or raw outputs")
    scale: Literal["width", "simplex"] = Field(default="width", description="gates of mean 1, or s itself")
    jointly: bool = Field(default=False, description="all groups at once instead of one at a time")
    prior: float = Field(default=2.0, gt=0, le=10**6, description="alpha of the symmetric prior")
    start: float | None = Field(
        default=None, ge=-1000, le=1000, description="of every v, phi = softplus(v); default: at the prior"
    )
    rank: int = Field(default=4, ge=1, le=65536, description="logistic_normal: of the covariance beside its diagonal")
    draws: int = Field(
        default=5, ge=1, le=65536, description="integral: draws per step, the same for all images of a batch"
    )
    average: Literal["logits", "losses"] = Field(default="logits", description="integral: what is averaged over draws")
    kl_weight: float = Field(default=1.0, ge=0, le=10**6, description="of the divergence from the prior")
    kl_scale: Literal["images", "batch"] = Field(default="images", description="divided by the images, or by a batch's")
    kl_epochs: int = Field(default=0, ge=0, le=10**6, description="the weight rises linearly over so many epochs")
    epochs: int = Field(default=1, ge=1, le=10**6)
    batch: int = Field(default=100, ge=1, le=65536)
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = Field(default=0.1, gt=0, le=10**6)
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd")
    weight_decay: float = Field(
        default=0.0, ge=0, le=1000, description="on the gates' parameters (ResNet-56's program: 1e-4)"
    )

    @model_validator(mode="after")
    def _drawn(self):
        if self.posterior == "logistic_normal" and self.variant == "point":
            raise ValueError("a logistic normal's covariance is only seen by draws: set variant to integral")
        return self


class DirichletSwitches(base.RankingMethod):
    """Keeps the channels with the largest posterior means."""

    paper = "Adamczewski, Park, Dirichlet Pruning for Neural Network Compression, AISTATS 2021"
    Options = Options

    def score(self, context: base.ScoringContext) -> base.Scores:
        """``<group>:posterior`` float64: (1, C) phi, or (2 + rank, C) of the logistic normal."""
        names = [group.name for group in context.graph.free]
        if self.options.jointly:
            tables = self._trained(context, names)
        else:
            tables = context.map_jobs(names, lambda name: self._trained(context, [name])[0])
        for name, table in zip(names, tables, strict=True):
            if not bool(table.isfinite().all()):
                raise PruneError(f"method.lr: the switches of {name} became infinite; lower it from {self.options.lr}")
        return {f"{name}:posterior": table for name, table in zip(names, tables, strict=True)}

    def _trained(self, context: base.ScoringContext, names: list[str]) -> list[Tensor]:
        """Train these groups' switches together; their posteriors' tables."""
        options, gates = self.options, SwitchTraining(self, context, names)
        more = {"momentum": options.momentum} if options.optimizer == "sgd" else {}
        context.train_parameters(
            [p for posterior in gates.posteriors for p in posterior.parameters], gates.loss, options.epochs, options.lr,
            options.batch, gates.watch, name=f"switches of {', '.join(names)}", calibration=True,
            train_mode=self.has("batch_statistics"), optimizer=options.optimizer, weight_decay=options.weight_decay,
            decay_norm_bias=True, **more,
        )  # fmt: skip
        return [posterior.table() for posterior in gates.posteriors]

    def _worth(self, scores: Mapping[str, Tensor], name: str) -> Tensor:
        mean = moments(self.require_score(scores, f"{name}:posterior"))[0]
        return reversed_ranking(mean) if self.has("reversed_ranking") else mean

    def importance(self, scores: Mapping[str, Tensor], graph: DependencyGraph) -> dict[str, Tensor]:
        return {group.name: self._worth(scores, group.name) for group in graph.free}

    def table(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> list[dict[str, Any]]:
        """Per group: the largest and smallest gate of mean 1, correlations between channels, share of positive ones."""
        rows = []
        for group in graph.free:
            mean, covariance = moments(self.require_score(scores, f"{group.name}:posterior"))
            low, high, positive = _between(covariance)
            gate = mean * group.width
            rows.append({
                "group": group.name, "smallest_gate": float(gate.min()), "largest_gate": float(gate.max()),
                "correlation_from": low, "correlation_to": high, "positive_percent": positive,
            })  # fmt: skip
        return rows

    def similarity_maps(
        self, scores: Mapping[str, Tensor], graph: DependencyGraph, request: SelectionRequest
    ) -> Iterator[SimilarityMap]:
        """The posterior's correlation between channels: dark where two rise together (a Dirichlet's never do)."""
        plan = self.select(scores, graph, request)
        for group in graph.free:
            _, covariance = moments(self.require_score(scores, f"{group.name}:posterior"))
            low, high, positive = _between(covariance)
            kept = np.zeros(group.width, dtype=bool)
            kept[plan.kept(group.name)] = True
            said = (
                f"{group.width} channels, {int(kept.sum())} kept; posterior correlation {low:.3g} to {high:.3g}, "
                f"{positive:.0f} % of the pairs positive"
            )
            likeness = ((1 + correlation(covariance)) / 2).clamp(0, 1).numpy()
            yield SimilarityMap(group.name, likeness, np.full(group.width, -1), kept, said)


class SwitchTraining:
    """The switches of some groups while they train."""

    def __init__(self, method_: DirichletSwitches, context: base.ScoringContext, names: list[str]):
        self.has, self.options, self.context, self.names = method_.has, method_.options, context, names
        self.posteriors: list[Posterior] = [self._start(context.graph.group(name).width) for name in names]
        self.points = [p for name in names for p in gate_points(context.graph, name, self.options.place)]
        self.step, self._rest = 0, None
        norms = [pooled_norm(context.graph, group) for group in context.graph.groups]
        self.dropped = [norm.layer for norm in norms if norm is not None] if self.has("dropout") else []

    def _start(self, width: int) -> Posterior:
        if self.options.posterior == "logistic_normal":
            return LogisticNormal(width, self.options.prior, self.options.rank)
        return Dirichlet(width, self.options.prior, self.options.start)

    def watch(self, step: int) -> None:
        """After each update: the next one's number decides its noise."""
        self.step = step + 1

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        """(n,) cross-entropies, each with its part of the divergence: in the mean over all ranks it counts once."""
        point = self.options.variant == "point"
        with dropout(model, self.dropped, self._masks(ids)):
            losses = self._at_mean(model, images, labels) if point else self._drawn(model, images, labels)
        return losses + (self._divergence() if self.options.kl_weight else 0)

    def _masks(self, ids: Tensor) -> Callable[[str, Tensor], Tensor]:
        """Masks of 0 and 2 for a layer's maps, each image's (and each of its copies') from (seed, group, step, id)."""

        def masks(layer: str, maps: Tensor) -> Tensor:
            copies_, where = max(1, len(maps) // max(1, len(ids))), ("dropout", layer, *self.names, self.step)
            drawn = [
                torch.rand((copies_, *maps.shape[1:]), generator=self.context.generator(*where, int(image)))
                for image in ids
            ]
            kept = torch.stack(drawn, 1).flatten(0, 1) >= DROPPED if drawn else torch.zeros(maps.shape)
            return kept.to(maps.device, maps.dtype) / (1 - DROPPED)

        return masks

    def _at_mean(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        values = {name: self._scaled(p.mean()) for name, p in zip(self.names, self.posteriors, strict=True)}
        with gate(model, self.points, values):
            return functional.cross_entropy(model(images), labels, reduction="none")

    def _drawn(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The part behind the switch runs on every image times every draw; noise comes from (seed, group, step)."""
        draws, n = self.options.draws, len(images)
        if not n:
            return images.new_zeros(0)
        if self._rest is None:
            self._rest = SplitForward(model, fx_steps(model), [point.point.layer for point in self.points])
            self._rest.verify(images)
        values = {}
        for name, posterior in zip(self.names, self.posteriors, strict=True):
            sample = posterior.sample(draws, self.context.generator("switches", name, self.step))
            values[name] = self._scaled(sample).to(images.device, non_blocking=True).repeat_interleave(n, 0)
        with torch.no_grad():
            live = repeat_batch(self._rest.head(images), draws)
        with gate(model, self.points, values):
            logits = self._rest.tail(live)
        logits = mixed_images(logits, draws) if self.has("mixed_images") else logits.view(draws, n, -1)
        return log_mean(logits, labels, self.options.average)

    def _scaled(self, values: Tensor) -> Tensor:
        return values * values.shape[-1] if self.options.scale == "width" else values

    def _divergence(self) -> Tensor:
        options, images = self.options, self.context.images
        epoch = 1 + self.step * options.batch // images
        weight = options.kl_weight * (min(epoch / options.kl_epochs, 1.0) if options.kl_epochs else 1.0)
        kl = torch.stack([
            kl_at_mean(p) if self.has("kl_at_mean") and isinstance(p, Dirichlet) else p.kl() for p in self.posteriors
        ]).sum()  # fmt: skip
        return weight * kl / (images if options.kl_scale == "images" else options.batch)


def _between(covariance: Tensor) -> tuple[float, float, float]:
    """Smallest and largest correlation between two channels, and the percentage of pairs with a positive one."""
    table = correlation(covariance)
    pairs = table[~torch.eye(len(table), dtype=torch.bool)]
    return float(pairs.min()), float(pairs.max()), 100 * float((pairs > 0).double().mean())


# What the released code does otherwise (specification, sections 1.2 and 9); each is a quirk of its name.
# batch_statistics (the switches train with batch norms in training mode) is bench.fit's train_mode.


def mixed_images(logits: Tensor, draws: int) -> Tensor:
    """Activations are laid out draw by draw, logits are read image by image: those of other images are averaged."""
    return logits.view(-1, draws, logits.shape[-1]).transpose(0, 1)


def dropout(
    model: nn.Module, layers: Sequence[str], masks: Callable[[str, Tensor], Tensor]
) -> AbstractContextManager[None]:
    """LeNet's switch networks drop half of what leaves each of its batch norms, which its network does not."""
    points = [HookPoint(name, "", 0, "norm", False) for name in layers]
    return capture_outputs(model, points, lambda point, maps: maps * masks(point.name, maps))


def kl_at_mean(posterior: Dirichlet) -> Tensor:
    """LeNet's point form takes the divergence at the normalised mean instead of at phi."""
    return dirichlet_kl(posterior.mean(), posterior.alpha)


def reversed_ranking(mean: Tensor) -> Tensor:
    """The wide residual network's program turns the ranking round before it cuts: the largest switches go."""
    return -mean

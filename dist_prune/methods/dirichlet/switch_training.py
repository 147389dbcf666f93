"""Training of the switches of some groups: the negative evidence lower bound of each batch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.methods import base
from dist_prune.methods.dirichlet import quirks
from dist_prune.methods.dirichlet.options import Options
from dist_prune.methods.dirichlet.posteriors import Dirichlet, LogisticNormal, Posterior, log_mean
from dist_prune.pruning.hooks.activations import pooled_norm
from dist_prune.pruning.hooks.gating import gate, gate_points
from dist_prune.pruning.hooks.split_forward import SplitForward, fx_steps, repeat_batch


class SwitchTraining:
    """The switches of some groups while they train.

    Attributes:
        posteriors: one for each group, in the order of their names.
        points: hook points at which the switches multiply.
        step: number of the next update; it determines that update's noise.
        dropped: batch norms whose outputs quirk ``dropout`` drops.
    """

    def __init__(self, options: Options, context: base.ScoringContext, names: list[str]):
        """Start the posteriors at the prior, or at ``options.start``.

        Args:
            options: the method's.
            context: gives the graph, the noise and the number of images.
            names: the groups that train together.
        """
        self.options = options
        self.context = context
        self.names = names
        self.posteriors: list[Posterior] = [self._start(context.graph.group(name).width) for name in names]
        self.points = [p for name in names for p in gate_points(context.graph, name, self.options.place)]
        self.step = 0
        self._split: SplitForward | None = None
        norms = [pooled_norm(context.graph, group) for group in context.graph.groups]
        self.dropped = [norm.layer for norm in norms if norm is not None] if options.has("dropout") else []

    def _start(self, width: int) -> Posterior:
        if self.options.posterior == "logistic_normal":
            return LogisticNormal(width, self.options.prior, self.options.rank)
        return Dirichlet(width, self.options.prior, self.options.start)

    def watch(self, step: int) -> None:
        """Note, after update ``step``, the number of the next one."""
        self.step = step + 1

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        """Compute the loss of each image: minus the log-likelihood, plus the divergence from the prior.

        Every image carries the whole divergence term, so it counts once in the mean over all ranks.

        Args:
            model: the dense network.
            images: (n, 3, H, W), this rank's part of the batch.
            labels: (n,) int64.
            ids: (n,) int64 ids of the images, for the noise of quirk ``dropout``.

        Returns:
            (n,) losses.
        """
        point = self.options.variant == "point"
        with quirks.dropout(model, self.dropped, self._dropout_masks(ids)):
            losses = self._loss_at_mean(model, images, labels) if point else self._loss_of_draws(model, images, labels)
        return losses + (self._divergence() if self.options.kl_weight else 0)

    def _dropout_masks(self, ids: Tensor) -> Callable[[str, Tensor], Tensor]:
        """Masks of 0 and 2 for a layer's maps; those of an image and its copies come from (seed, group, step, id)."""

        def masks(layer: str, maps: Tensor) -> Tensor:
            copies = max(1, len(maps) // max(1, len(ids)))
            seed = ("dropout", layer, *self.names, self.step)
            drawn = [
                torch.rand((copies, *maps.shape[1:]), generator=self.context.generator(*seed, int(image)))
                for image in ids
            ]
            kept = torch.stack(drawn, 1).flatten(0, 1) >= quirks.DROPPED if drawn else torch.zeros(maps.shape)
            return kept.to(maps.device, maps.dtype) / (1 - quirks.DROPPED)

        return masks

    def _loss_at_mean(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        values = {name: self._scaled(p.mean()) for name, p in zip(self.names, self.posteriors, strict=True)}
        with gate(model, self.points, values):
            return functional.cross_entropy(model(images), labels, reduction="none")

    def _loss_of_draws(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Losses over draws from the posteriors; the noise comes from (seed, group, step).

        Only the layers after the first switch run on every image times every draw.
        """
        draws, n = self.options.draws, len(images)
        if not n:
            return images.new_zeros(0)
        if self._split is None:
            self._split = SplitForward(model, fx_steps(model), [point.point.layer for point in self.points])
            self._split.verify(images)
        values = {}
        for name, posterior in zip(self.names, self.posteriors, strict=True):
            sample = posterior.sample(draws, self.context.generator("switches", name, self.step))
            values[name] = self._scaled(sample).to(images.device, non_blocking=True).repeat_interleave(n, 0)
        with torch.no_grad():
            live = repeat_batch(self._split.head(images), draws)
        with gate(model, self.points, values):
            logits = self._split.tail(live)
        logits = quirks.mixed_images(logits, draws) if self.options.has("mixed_images") else logits.view(draws, n, -1)
        return log_mean(logits, labels, self.options.average)

    def _scaled(self, values: Tensor) -> Tensor:
        return values * values.shape[-1] if self.options.scale == "width" else values

    def _divergence(self) -> Tensor:
        options, images = self.options, self.context.images
        epoch = 1 + self.step * options.batch // images
        weight = options.kl_weight * (min(epoch / options.kl_epochs, 1.0) if options.kl_epochs else 1.0)
        at_mean = options.has("kl_at_mean")
        terms = [quirks.kl_at_mean(p) if at_mean and isinstance(p, Dirichlet) else p.kl() for p in self.posteriors]
        kl = torch.stack(terms).sum()
        return weight * kl / (images if options.kl_scale == "images" else options.batch)

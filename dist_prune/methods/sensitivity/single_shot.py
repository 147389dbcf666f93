"""The single-shot scores of a round: sensitivities of a re-initialised copy of the dense network, update by update."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dist_prune.methods import base
from dist_prune.methods.sensitivity import quirks
from dist_prune.methods.sensitivity.options import Options
from dist_prune.methods.sensitivity.snip import (
    filter_scores,
    learner_input,
    sensitivities,
    target_masks,
    xavier_reinit,
)
from dist_prune.pruning.graph.groups import ChannelGroup, DependencyGraph, Layer


class SingleShotScore:
    """The single-shot score of a round: a re-initialised copy of the dense network, one pass per update.

    Attributes:
        weights: layer -> weight of the copy, of every layer that the target or a share of the sensitivity needs.
    """

    def __init__(
        self,
        options: Options,
        context: base.ScoringContext,
        graph: DependencyGraph,
        groups: Sequence[ChannelGroup],
        number: int,
    ):
        """Copy the dense network.

        Args:
            options: the method's.
            context: gives the network, the seeds and the sum over ranks.
            graph: of the dense network, with the groups that the method may prune as its free ones.
            groups: those of the round; the name of a group is that of its only producer.
            number: the round's, from 1; it seeds the weights.
        """
        self._options = options
        self._context = context
        self._number = number
        self._graph = graph
        self._names = [group.name for group in groups]
        self._copy = context.clone_model().train().requires_grad_(False)
        if options.has("fresh_norms"):
            quirks.fresh_norms(self._copy)
        self.weights: dict[str, Tensor] = {}
        for name in self._scored_layers():
            self.weights[name] = self._copy.get_parameter(f"{name}.weight").requires_grad_(True)

    def _scored_layers(self) -> Iterable[str]:
        """The layers that the target or a share of the sensitivity needs."""
        options, layers = self._options, self._graph.layers
        if options.sort == "layer" and options.total == "layer":
            return self._names
        if options.pool == "prunable":
            return [group.name for group in self._graph.free]
        kinds = ("conv", "linear") if options.pool == "layers" else (layers[self._names[0]].kind,)
        return [name for name, layer in layers.items() if layer.kind in kinds and not layer.depthwise]

    def compute(self, images: Tensor, labels: Tensor, update: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the inputs of the masks and the target masks of one batch, the same on every rank.

        Args:
            images: (n, 3, H, W), this rank's part of the batch.
            labels: (n,) int64.
            update: number of the update, from 0; it seeds the weights of the copy.

        Returns:
            Group -> (1, C, k, k) or (1, C, 1, 1) input of its mask, and group -> (C,) bool target mask.
        """
        options = self._options
        seed = self._context.generator("sensitivity", "weights", self._number, update).initial_seed()
        xavier_reinit(self._copy, seed, options.redraw_linear)
        factor = 1.0
        if options.has("small_mask"):
            factor = quirks.shrink_weights([self.weights[name] for name in self._names])
        signed = sensitivities(self._context.all_reduce_sum_, self._copy, self.weights, images, labels, self._loss())
        signed |= {name: signed[name] / factor for name in self._names}
        scores = {name: filter_scores(value) for name, value in signed.items()}
        pool = scores if options.sort == "global" else {name: scores[name] for name in self._names}
        targets = target_masks(pool, options.keep, options.sort, options.fallback == "few")
        pool_total = torch.stack([value.sum() for value in scores.values()]).sum()
        inputs = {}
        for name in self._names:
            value = signed[name]
            if options.has("reshape") and value.dim() == 4:
                value = quirks.as_released_reshape(value)
            total = pool_total if options.total == "pool" else scores[name].sum()
            inputs[name] = learner_input(value.abs(), total.to(value.dtype), is_pointwise(self._graph.layers[name]))
        return inputs, {name: targets[name] for name in self._names}

    def _loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        if self._options.has("raw_logits"):
            return quirks.raw_logits
        return lambda logits, labels: functional.cross_entropy(logits, labels, reduction="sum")


def is_pointwise(layer: Layer) -> bool:
    """Whether a layer is linear, or a convolution with one output position: its mask reads whole filters."""
    return layer.kind == "linear" or layer.positions == 1

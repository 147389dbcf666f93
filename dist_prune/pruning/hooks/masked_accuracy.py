"""Metrics of a network without some channels of one group, for example its accuracy: the value of a coalition."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn

from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.capture import reproducible_kernels
from dist_prune.pruning.hooks.gating import Where, gate, gate_points
from dist_prune.pruning.hooks.split_forward import SplitForward, fx_steps, repeat_batch

Batches = Callable[
    [int], Iterable[tuple[Tensor, Tensor]]
]  # number of the first micro-batch -> (images, labels) of each
BatchMetric = Callable[[Tensor, Tensor], Tensor]  # logits (m, n, classes) and labels (n,) -> (m, ...) int64


class MaskedAccuracy:
    """A metric of the network for coalitions of one group's channels, on fixed images.

    The activations before the first gate are cached for as many micro-batches as the memory allows, so that a coalition
    costs only the layers after it. The last bits of the logits depend on the micro-batches and on the number of
    coalitions that run together, hence the metrics are integers. They do not depend on the cache.

    Args:
        model: a bare network.
        steps: ``split_forward.fx_steps(model)``.
        graph: the network's dependency graph.
        group: name of the channel group whose channels are the players.
        where: where switched-off channels become zero (``gating.gate_points``).
        batches: the images and labels, from a given micro-batch on; the same ones in every call.
        memory: bytes of the cache.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: fx.GraphModule | None,
        graph: DependencyGraph,
        group: str,
        where: Where,
        batches: Batches,
        memory: int,
    ):
        self.model = model
        self.group = group
        self.batches = batches
        self.memory = memory
        self.points = gate_points(graph, group, where)
        self.split = SplitForward(model, steps, [point.point.layer for point in self.points])
        self._cache: list[tuple[tuple[Tensor, ...], Tensor]] | None = None

    @property
    def runs_whole_network(self) -> bool:
        """Whether every coalition costs a full forward pass, because the network could not be split at the gate."""
        return self.split.unsplit

    @torch.no_grad()
    def evaluate(self, off: Tensor, metric: BatchMetric) -> Tensor:
        """Compute a metric of each coalition, summed over the micro-batches.

        Args:
            off: (m, C) bool, True for the channels that are switched off in each of m coalitions.
            metric: integers of one micro-batch: logits (m, n, classes) and labels (n,) -> (m, ...) int64.

        Returns:
            (m, ...) int64 on the CPU.
        """
        with evaluation_mode(self.model), reproducible_kernels():
            if self._cache is None:
                self._fill_cache()
            assert self._cache is not None
            sums = [self._evaluate_batch(live, labels, off, metric) for live, labels in self._cache]
            for images, labels in self.batches(len(self._cache)) if not self._all_cached else ():
                sums.append(self._evaluate_batch(self.split.head(images), labels, off, metric))
        return torch.stack(sums).sum(0).cpu()  # one wait for the device, not one per batch

    def _evaluate_batch(self, live: tuple[Tensor, ...], labels: Tensor, off: Tensor, metric: BatchMetric) -> Tensor:
        with gate(self.model, self.points, {self.group: ~off}):
            logits = self.split.tail(repeat_batch(live, len(off)))
        return metric(logits.view(len(off), len(labels), logits.shape[-1]), labels)

    def _fill_cache(self) -> None:
        """Cache the head's outputs of as many micro-batches as fit in the memory."""
        cache = []
        used = 0
        self._all_cached = True
        for number, (images, labels) in enumerate(self.batches(0)):
            if number == 0:
                self.split.verify(images)
            live = self.split.head(images)
            used += sum(t.numel() * t.element_size() for t in live)
            if used > self.memory:
                self._all_cached = False
                break
            cache.append((live, labels))
        self._cache = cache


class MaskedAccuracyCache:
    """Makes the ``MaskedAccuracy`` of each group of one network on the same images, and keeps the last one.

    Args:
        model: a bare network.
        graph: its dependency graph.
        batches: the images and labels, from a given micro-batch on.
    """

    def __init__(self, model: nn.Module, graph: DependencyGraph, batches: Batches):
        self.model = model
        self.graph = graph
        self.batches = batches
        self._steps = fx_steps(model)
        self._last: tuple[tuple[str, Where, int], MaskedAccuracy] | None = None

    def for_group(self, group: str, where: Where, memory: int) -> MaskedAccuracy:
        """Return the ``MaskedAccuracy`` of a group; ``memory`` in bytes of cache."""
        key = (group, where, memory)
        if self._last is None or self._last[0] != key:
            self._last = None  # frees its cache before the next one is filled
            masked_accuracy = MaskedAccuracy(self.model, self._steps, self.graph, group, where, self.batches, memory)
            self._last = key, masked_accuracy
        return self._last[1]

"""How many images a network gets right without some channels of one group: the value of a coalition, as an integer."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn

from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.capture import reproducible_kernels
from dist_prune.pruning.hooks.gating import Where, gate, gate_points
from dist_prune.pruning.hooks.split_forward import SplitForward, fx_steps, repeat_batch

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]  # from which micro-batch on -> images and labels of each
BatchMetric = Callable[[Tensor, Tensor], Tensor]  # logits (m, n, classes) and labels (n,) -> (m, ...) int64


class MaskedAccuracy:
    """One group's channels as players, on fixed images.

    What the network computes before the first switch is kept for as many micro-batches as the memory allows, so that a
    coalition costs the part behind it. The micro-batches and the number of coalitions that go through the network
    together decide the last bits, hence the integers; what is kept does not.

    Attributes:
        whole: every coalition costs a full forward pass, because the network could not be cut there.
    """

    def __init__(
        self, model: nn.Module, graph: fx.GraphModule | None, channels: DependencyGraph, group: str, where: Where,
        batches: Batches, memory: int,
    ):  # fmt: skip
        """``graph`` is ``split_forward.traced(model)``; ``memory`` in bytes."""
        self.model, self.group, self.batches, self.memory = model, group, batches, memory
        self.points = gate_points(channels, group, where)
        self.rest = SplitForward(model, graph, [point.point.layer for point in self.points])
        self._kept: list[tuple[tuple[Tensor, ...], Tensor]] | None = None

    @property
    def runs_whole_network(self) -> bool:
        return self.rest.unsplit

    @torch.no_grad()
    def evaluate(self, off: Tensor, judge: BatchMetric) -> Tensor:
        """What a judge counts of each coalition, added over the micro-batches.

        Args:
            off: (m, C) bool, the channels that are switched off in each of m coalitions.
        """
        with evaluation_mode(self.model), reproducible_kernels():
            if self._kept is None:
                self._fill()
            assert self._kept is not None
            parts = [self._judged(live, labels, off, judge) for live, labels in self._kept]
            for images, labels in self.batches(len(self._kept)) if not self._all else ():
                parts.append(self._judged(self.rest.head(images), labels, off, judge))
        return torch.stack(parts).sum(0).cpu()  # not part by part: the device is waited for once

    def _judged(self, live: tuple[Tensor, ...], labels: Tensor, off: Tensor, judge: BatchMetric) -> Tensor:
        with gate(self.model, self.points, {self.group: ~off}):
            logits = self.rest.tail(repeat_batch(live, len(off)))
        return judge(logits.view(len(off), len(labels), logits.shape[-1]), labels)

    def _fill(self) -> None:
        """Keep what the heads give, as far as the memory goes."""
        kept, used, self._all = [], 0, True
        for number, (images, labels) in enumerate(self.batches(0)):
            if number == 0:
                self.rest.verify(images)
            live = self.rest.head(images)
            used += sum(t.numel() * t.element_size() for t in live)
            if used > self.memory:
                self._all = False
                break
            kept.append((live, labels))
        self._kept = kept


class MaskedAccuracyCache:
    """The games of one network on the same images; the last one is kept."""

    def __init__(self, model: nn.Module, graph: DependencyGraph, batches: Batches):
        self.model, self.graph, self.batches, self._graph = model, graph, batches, fx_steps(model)
        self._last: tuple[tuple[str, Where, int], MaskedAccuracy] | None = None

    def for_group(self, group: str, where: Where, memory: int) -> MaskedAccuracy:
        """The game of a group; ``memory`` in bytes."""
        asked = (group, where, memory)
        if self._last is None or self._last[0] != asked:
            self._last = None  # its tables go before the next ones come
            masked_accuracy = MaskedAccuracy(self.model, self._graph, self.graph, group, where, self.batches, memory)
            self._last = asked, masked_accuracy
        return self._last[1]

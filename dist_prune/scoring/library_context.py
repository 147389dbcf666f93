"""The scoring context of the library: a user's own images, which may lack labels or be absent."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_prune.data.sample_loader import SampleLoader
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.models.wrappers import unwrap
from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.called_layers import call_layers_of_units
from dist_prune.pruning.graph.groups import DependencyGraph, HookPoint
from dist_prune.pruning.hooks.gating import Where
from dist_prune.pruning.hooks.statistics import Statistic
from dist_prune.pruning.network_output import num_logits
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.tasks.outputs import main_output
from dist_prune.training.fit_model import Loss


@dataclass
class LibraryScoringContext(DistributedScoringContext):
    """A scoring context over a ``SampleLoader``: what is missing is refused when a method asks for it.

    Attributes:
        has_images: whether the user gave images.
    """

    has_images: bool = True

    def collect(
        self,
        points: Sequence[HookPoint],
        statistic: Statistic,
        backward: bool = False,
        *,
        train_mode: bool = False,
        augment: bool = False,
    ) -> dict[str, dict[str, Tensor]]:
        """See DistributedScoringContext; PruneError without images, or without labels for gradients of the loss."""
        self._need_images()
        if backward:
            self._need_labels()
        return super().collect(points, statistic, backward, train_mode=train_mode, augment=augment)

    def count_correct(self, group: str, off: Tensor, *, where: Where = "consumed", memory_mb: int = 1024) -> list[int]:
        """See DistributedScoringContext; PruneError without images or labels."""
        self._need_labels()
        return super().count_correct(group, off, where=where, memory_mb=memory_mb)

    def train_parameters(
        self,
        parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
        loss: Loss,
        epochs: int,
        lr: float,
        batch: int,
        watch: Callable[[int], Any] = lambda step: None,
        **training: Any,
    ) -> list[dict[str, float]]:
        """See DistributedScoringContext; PruneError without images or labels."""
        self._need_labels()
        return super().train_parameters(parameters, loss, epochs, lr, batch, watch, **training)

    def train_model(
        self,
        model: nn.Module,
        loss: Loss,
        epochs: int,
        lr: float,
        batch: int,
        watch: Callable[[int], Any] = lambda step: None,
        **training: Any,
    ) -> list[dict[str, float]]:
        """See DistributedScoringContext; PruneError without images or labels."""
        self._need_labels()
        return super().train_model(model, loss, epochs, lr, batch, watch, **training)

    @property
    def labels(self) -> Tensor:
        """See DistributedScoringContext; PruneError without images or labels."""
        self._need_labels()
        return super().labels

    def _need_images(self) -> None:
        if not self.has_images:
            raise PruneError("this method looks at calibration images: give dist_prune.score a loader")
        images = next(self.loader.batches([self.ids[:1]])).images
        if images.shape[1] != self.graph.example[0]:
            raise PruneError(
                f"the loader's images have {images.shape[1]} channels; the network was traced with "
                f"{self.graph.example[0]}"
            )

    def _need_labels(self) -> None:
        self._need_images()
        if self.task.targets == "anything":
            return
        weight = next(self.model.parameters())
        with torch.no_grad(), evaluation_mode(self.model):
            output = self.model(torch.zeros(1, *self.graph.example, device=weight.device, dtype=weight.dtype))
        samples = cast(SampleLoader, self.loader)
        if self.task.is_classification:
            samples.require_labels(num_logits(output))
            return
        found = main_output(output)
        samples.outputs = found.shape[1] if isinstance(found, Tensor) and found.dim() > 1 else 0
        first = next(samples.batches([self.ids[:1]])).labels
        if first.dim() == 1 and not first.is_floating_point() and int(first[0]) < 0:  # no other targets have this form
            raise PruneError("this method needs labels, and the loader gives images alone: give (images, labels)")


def check_same_layers(model: nn.Module, graph: DependencyGraph) -> None:
    """PruneError unless the network has the graph's layers with their dense widths."""
    call_layers_of_units(model, {group.name: group.width for group in graph.groups})
    modules = dict(model.named_modules())
    for name, layer in graph.layers.items():
        weight = getattr(modules.get(name), "weight", None)
        width = layer.width_in if layer.transposed else layer.width_out
        if layer.kind in ("conv", "linear") and (weight is None or len(weight) != width):
            raise PruneError(
                f"the graph was traced on another network: {name} is not there with {layer.width_out} outputs"
                + (f", it has {len(weight)}: was it cut already?" if weight is not None else "")
            )


def check_same_network(model: nn.Module, graph: DependencyGraph, comm: Communicator) -> None:
    """PruneError unless the network has the graph's layers, and the same weights on every rank."""
    check_same_layers(model, graph)
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(name.encode())
        whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if len(set(comm.all_gather_object(whole.hexdigest()))) != 1:
        raise PruneError(
            "the network has other weights on other ranks, so there is no one plan: load the same checkpoint on every "
            "rank, or broadcast the first rank's weights"
        )


@torch.no_grad()
def share_buffers(model: nn.Module, comm: Communicator) -> None:
    """Share batch norm statistics, which DistributedDataParallel broadcasts before a forward pass and not after it."""
    parallel = nn.parallel.DistributedDataParallel
    if comm.world > 1 and any(isinstance(m, parallel) and m.broadcast_buffers for m in model.modules()):
        for buffer in unwrap(model).buffers():
            buffer.copy_(comm.broadcast(buffer))

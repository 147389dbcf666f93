"""Repair on the ranks of a run: second moments of each layer merged over ranks, solved, and written to the network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.data.sampling import micro_batches, shard
from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.resumable_state import ResumableState, identity_of
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.capture import reproducible_kernels
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.repair.paired_walk import PairedWalk
from dist_prune.pruning.repair.repaired_layers import RepairedLayer, change_layer, repaired_layers, rows_of, table_sizes
from dist_prune.pruning.repair.second_moments import SecondMoments
from dist_prune.pruning.repair.solving import Change, bias_change, ridge_change
from dist_prune.training.tracking import Tracker

Repair = Literal["none", "norms", "bias", "fold", "least_squares"]


@dataclass
class Repairer:
    """Repairs pruned networks on fixed images.

    Attributes:
        loader: the images; labels are not read.
        ids: (n,) their ids, ascending.
        comm: all ranks.
        tracker: progress and messages.
        method: what is changed.
        ridge: see ``ridge_change``.
        micro_batch: images that go through the networks together.
        memory: bytes of activations that a rank may hold between two layers.
        file: where progress is saved, or None.
        identity: of everything that decides the result beside the above.
    """

    loader: Any
    ids: np.ndarray
    comm: Communicator
    tracker: Tracker
    method: Repair = "least_squares"
    ridge: float | None = None
    micro_batch: int = 16
    memory: int = 2**31
    file: Path | None = None
    identity: str = ""

    def run(self, dense: nn.Module, small: nn.Module, graph: DependencyGraph, plan: Plan) -> list[dict[str, Any]]:
        """Repair a network in place. Collective.

        Returns:
            A line for each layer: ``layer``, ``ridge``, ``before`` and ``after`` (mean square of the errors).

        Raises:
            PreemptedError: the run was asked to stop; the layers that are done are saved.
        """
        layers = repaired_layers(dense, small, graph, plan)
        settings = (self.identity, self.method, self.ridge, self.micro_batch, self.ids.tolist(), plan.fingerprint)
        state = ResumableState(self.file, identity_of(*settings), self.comm)
        saved, meta = state.load()
        lines: list[dict[str, Any]] = list(meta.get("lines", []))
        if lines:
            self.tracker.info(f"  repair: resumes after {len(lines)} of {len(layers)} layers")
        lists = micro_batches(self.ids, self.micro_batch)
        own = shard(list(range(len(lists))), self.comm.rank, self.comm.world)
        images = [batch.images for batch in self.loader.batches([lists[number] for number in own])]
        walk = PairedWalk(dense, small, images, layers, self.memory)
        for number in self.tracker.bar(range(len(layers)), len(layers), "repair"):
            layer = layers[number]
            if number < len(lines):
                self._put(small, layer, saved)
                continue
            with reproducible_kernels():
                change = self._change(small, layer, walk, own)
            weight, bias = (self.comm.broadcast(table.contiguous()) for table in (change.weight, change.bias))
            change_layer(small, layer, weight, bias)
            ridge = None if change.ridge == float("inf") else change.ridge
            lines.append(
                {"layer": layer.name, "ridge": ridge, "before": change.error_before, "after": change.error_after}
            )
            if self.file is not None:
                saved |= self._take(small, layer)
                state.save(saved, lines=lines)
            if preemption.poll(self.comm)[0]:
                raise preemption.preempted_error(f"while repairing, after {number + 1} of {len(layers)} layers")
        return lines

    def _change(self, small: nn.Module, layer: RepairedLayer, walk: PairedWalk, own: Sequence[int]) -> Change:
        module = small.get_submodule(layer.name)
        moments = SecondMoments(*table_sizes(module), next(small.parameters()).device)
        for number, (x, errors) in zip(own, walk.pairs(layer), strict=True):
            start = number * self.micro_batch
            for half in (0, 1):
                chosen = slice((half + start) % 2, None, 2)
                if len(x[chosen]):
                    moments.update(half, rows_of(module, x[chosen], errors[chosen]))
        self.comm.all_reduce("sum", moments.tables)
        if self.method == "bias":
            change = bias_change(moments)
            return change
        return ridge_change(moments, self.ridge, layer.has_intercept(small))

    def _take(self, small: nn.Module, layer: RepairedLayer) -> dict[str, Tensor]:
        """The tensors that a repair of the layer changes, by their names in the state dict."""
        tensors = {f"{layer.name}.weight": small.state_dict()[f"{layer.name}.weight"]}
        for name in (f"{layer.name}.bias", f"{layer.norm}.running_mean"):
            if name in (state := small.state_dict()):
                tensors[name] = state[name]
        return {name: tensor.detach().clone().cpu() for name, tensor in tensors.items()}

    @torch.no_grad()
    def _put(self, small: nn.Module, layer: RepairedLayer, saved: dict[str, Tensor]) -> None:
        own = small.state_dict()
        for name in self._take(small, layer):
            own[name].copy_(saved[name])

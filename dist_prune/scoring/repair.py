"""Repair on the ranks of a run: second moments of each layer merged over ranks, solved, and written to the network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.config.pruning import RepairMethod
from dist_prune.data.sampling import micro_batches, shard
from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.resumable_state import ResumableState, identity_of
from dist_prune.errors import PruneError
from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.graph.groups import DependencyGraph
from dist_prune.pruning.hooks.capture import capture_outputs, reproducible_kernels
from dist_prune.pruning.hooks.statistics import Accumulator
from dist_prune.pruning.plan.block_masks import weight_masks
from dist_prune.pruning.plan.plan import Plan
from dist_prune.pruning.plan.weight_blocks import remaining_positions
from dist_prune.pruning.repair.cost import repair_cost
from dist_prune.pruning.repair.folding import fold, folded_readers
from dist_prune.pruning.repair.input_moments import InputMoments
from dist_prune.pruning.repair.paired_walk import PairedWalk
from dist_prune.pruning.repair.regression_rows import errors_alone, rows_of, table_sizes
from dist_prune.pruning.repair.repaired_layers import (
    RepairedLayer,
    change_layer,
    column_blocks,
    repaired_layers,
    stay_text,
)
from dist_prune.pruning.repair.second_moments import SecondMoments
from dist_prune.pruning.repair.solving import (
    RIDGES,
    Change,
    best_ridge,
    bias_change,
    held_out_errors,
    ridge_change,
)
from dist_prune.scoring.norm_refit import refit_norms
from dist_prune.training.bn_recalibration import recalibrate_bn
from dist_prune.training.tracking import Tracker

Line = dict[str, Any]


@dataclass
class Repairer:
    """Repairs pruned networks on fixed images.

    Attributes:
        loader: the images; labels are not read.
        ids: (n,) their ids, ascending.
        comm: all ranks.
        tracker: progress and messages.
        method: what is changed; a recipe's ``repair.method``.
        ridge: see ``ridge_change``.
        micro_batch: images that go through the networks together.
        memory: bytes of activations that a rank may hold between two layers.
        file: where progress is saved, or None.
        identity: of everything that decides the result beside the above.
        norms: ``refit`` gives norms over channels that lost channels new scales and shifts before anything else.
    """

    loader: Any
    ids: np.ndarray
    comm: Communicator
    tracker: Tracker
    method: RepairMethod = "least_squares"
    ridge: float | None = None
    micro_batch: int = 16
    memory: int = 2**31
    file: Path | None = None
    identity: str = ""
    norms: Literal["plain", "refit"] = "plain"

    def run(self, dense: nn.Module, small: nn.Module, graph: DependencyGraph, plan: Plan) -> list[Line]:
        """Repair a network in place. Collective; every rank gets the same bits, whatever their number.

        Args:
            dense: the network that was pruned; not changed.
            small: what the plan leaves of it, as it was cut.
            graph: of ``dense``.
            plan: in coordinates of ``dense``.

        Returns:
            A line for each layer that was solved for: ``layer``, ``ridge`` (None: it stays as it is), ``before`` and
            ``after`` (mean square of its outputs' errors). Empty for the other methods.

        Raises:
            PruneError: ``small`` is not what the plan leaves, or activations overflow.
            PreemptedError: the run was asked to stop; the layers that are done are saved.
        """
        _check_pruned(small, graph, plan)
        if self.norms == "refit":
            args = (self.loader, self.ids, self.micro_batch, self.comm)
            refitted = refit_norms(dense, small, graph, plan, *args)
            self.tracker.info(f"  repair: {len(refitted)} norms over channels refitted")
        if self.method == "none":
            return []
        if self.method == "norms":
            with reproducible_kernels():
                recalibrate_bn(small, self.loader, self.ids, self.micro_batch, self.comm, self.tracker)
            return []
        layers, stay = repaired_layers(small, graph, plan)
        if stay:
            self.tracker.info(f"  repair: {stay_text(stay)}")
        if self.method == "fold":
            self._fold(dense, small, graph, plan, {layer.name: layer for layer in layers})
            return []
        cost = repair_cost(graph, plan.counts, {layer.name for layer in layers})
        self.tracker.info(f"  repair: {cost.text(len(self.ids))}")
        return self._layer_by_layer(dense, small, graph, plan, layers)

    def _layer_by_layer(
        self, dense: nn.Module, small: nn.Module, graph: DependencyGraph, plan: Plan, layers: Sequence[RepairedLayer]
    ) -> list[Line]:
        settings = (self.identity, self.method, self.ridge, self.micro_batch, self.ids.tolist(), plan.fingerprint)
        settings += ("refit",) if self.norms == "refit" else ()
        state = ResumableState(self.file, identity_of(*settings), self.comm)
        saved, meta = state.load(lambda: self.tracker.info(f"  repair: {self.file} is damaged; it starts over"))
        lines: list[Line] = list(meta.get("lines", []))
        if lines:
            self.tracker.info(f"  repair: resumes after {len(lines)} of {len(layers)} layers")
            for layer in layers[: len(lines)]:
                self._put(small, layer, saved)
        own = shard(list(range(len(self._lists))), self.comm.rank, self.comm.world)
        images = [batch.images for batch in self.loader.batches([self._lists[number] for number in own])]
        walk = PairedWalk(dense, small, images, layers, self.memory)
        masks = weight_masks(plan, graph, small.state_dict())
        for number in self.tracker.bar(range(len(lines), len(layers)), len(layers) - len(lines), "repair"):
            layer = layers[number]
            with reproducible_kernels(), evaluation_mode(dense), evaluation_mode(small):
                lines.append(self._solve(small, layer, walk, own))
            if f"{layer.name}.weight" in masks:
                weight: Any = small.get_submodule(layer.name).weight
                weight.data.mul_(masks[f"{layer.name}.weight"].to(weight.device))
            if self.file is not None:
                saved |= self._take(small, layer)
                state.save(saved, lines=lines)
            if self.file is not None and preemption.poll(self.comm)[0]:
                raise preemption.preempted_error(f"while repairing, after {number + 1} of {len(layers)} layers")
        return lines

    @property
    def _lists(self) -> list[np.ndarray]:
        return micro_batches(self.ids, self.micro_batch)

    def _solve(self, small: nn.Module, layer: RepairedLayer, walk: PairedWalk, own: Sequence[int]) -> Line:
        """Repair one layer, block after block of its inputs."""
        changes = []
        blocks = [slice(None)] if self.method == "bias" else column_blocks(small.get_submodule(layer.name))
        for block in blocks:
            change = self._change(small, layer, walk, own, block)
            weight, bias = (self.comm.broadcast(table.contiguous()) for table in (change.weight, change.bias))
            change_layer(small, layer, weight, bias, block)
            changes.append(change)
        ridge = None if changes[-1].ridge == float("inf") else changes[-1].ridge
        line = {"layer": layer.name, "ridge": ridge}
        return line | {"before": changes[0].error_before, "after": changes[-1].error_after}

    def _change(
        self, small: nn.Module, layer: RepairedLayer, walk: PairedWalk, own: Sequence[int], block: slice
    ) -> Change:
        module, shifts = small.get_submodule(layer.name), self.method == "bias"
        groups, inputs, outputs = table_sizes(module, block)
        moments = SecondMoments(groups, 0 if shifts else inputs, outputs, next(small.parameters()).device)
        for number, (x, errors) in zip(own, walk.pairs(layer), strict=True):
            start = number * self.micro_batch
            for half in (0, 1):
                chosen = slice((half + start) % 2, None, 2)
                if len(x[chosen]):
                    found = errors[chosen]
                    rows = errors_alone(module, found) if shifts else rows_of(module, x[chosen], found, block)
                    moments.update(half, rows)
        self.comm.all_reduce("sum", moments.tables)
        if shifts:
            return bias_change(moments, inputs)
        intercept = layer.has_intercept(small)
        return ridge_change(
            moments, self._best_ridge(moments, intercept) if self.ridge is None else self.ridge, intercept
        )

    def _best_ridge(self, moments: SecondMoments, intercept: bool) -> float | None:
        """The ridge that suits a layer; the first two ranks solve for one half of the images each."""
        errors = [torch.zeros(len(RIDGES) + 1, dtype=torch.float64)]
        errors += [held_out_errors(moments, half, intercept) for half in (0, 1) if self._is_mine(half)]
        total = torch.stack(errors).sum(0)
        self.comm.all_reduce("sum", [total])
        return best_ridge(total)

    def _is_mine(self, half: int) -> bool:
        return half % self.comm.world == self.comm.rank

    def _fold(
        self, dense: nn.Module, small: nn.Module, graph: DependencyGraph, plan: Plan, layers: dict[str, RepairedLayer]
    ) -> None:
        """Fold removed channels into kept ones, by the second moments of one pass of the dense network."""
        readers = [
            (group, reader)
            for group, reader in folded_readers(graph, plan.removed)
            if reader.point.layer in layers and graph.layers[reader.point.layer].groups == 1
        ]
        points = list({reader.point.name: reader.point for _, reader in readers}.values())
        device = next(dense.parameters()).device
        tables = Accumulator(InputMoments(), points, len(self.ids), device)
        own = shard(self._lists, self.comm.rank, self.comm.world)
        with (
            torch.no_grad(),
            evaluation_mode(dense),
            reproducible_kernels(),
            capture_outputs(dense, points, lambda point, maps: tables.update(point, maps, torch.empty(0))),
        ):
            for batch in self.loader.batches(own):
                dense(batch.images)
        for (reduction, _), found in tables.reduction_buckets().items():
            self.comm.all_reduce(reduction, found)
        left = remaining_positions(graph, plan.removed)
        for group, reader in readers:
            name = reader.point.layer
            weight: Any = dense.get_submodule(name).weight
            if graph.layers[name].transposed:
                weight = weight.transpose(0, 1)
            rows = weight[torch.tensor(left[name, "out"], device=weight.device)]
            removed = sorted(plan.removed[group.name])
            change, bias = fold(rows, reader, removed, left[name, "in"], tables.tables[reader.point.name])
            change_layer(small, layers[name], change, bias)

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


def _check_pruned(small: nn.Module, graph: DependencyGraph, plan: Plan) -> None:
    """PruneError unless the layers of a network have the widths that a plan leaves."""
    modules = dict(small.named_modules())
    for name, (width_in, width) in graph.widths(plan.counts).items():
        weight: Any = getattr(modules.get(name), "weight", None)
        width = width_in if graph.layers[name].transposed else width
        if name in graph.layers_gone(plan.counts):
            continue
        if graph.layers[name].kind in ("conv", "linear") and (weight is None or len(weight) != width):
            found = "is not there" if weight is None else f"has {len(weight)} outputs"
            raise PruneError(
                f"the network to repair is not the one pruned by this plan: {name} {found}, the plan leaves {width}"
            )

"""One observation: a statistic of the calibration images, merged over ranks and saved to a file from time to time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.data.loader import Batch
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.resumable_state import ResumableState, identity_of
from dist_prune.pruning.graph.groups import HookPoint
from dist_prune.pruning.graph.head_groups import fold_units
from dist_prune.pruning.hooks.capture import capture_outputs
from dist_prune.pruning.hooks.statistics import Accumulator, Statistic, gradients
from dist_prune.tasks.base import Task

# Present name of a class -> its first name: partial scores are recognised by the name of their statistic.
FIRST_CLASS_NAMES = {
    "ZeroCounts": "Zeros",
    "MapRanks": "Ranks",
    "ActivationCensus": "Census",
    "SquaredChange": "Squares",
    "FirstOrderChange": "Products",
    "JointStatistic": "Several",
}


def first_class_name(value: object) -> str:
    """The first name of the class of ``value``."""
    name = type(value).__name__
    return FIRST_CLASS_NAMES.get(name, name)


def layer_weight(model: nn.Module, point: HookPoint) -> nn.Parameter:
    """The weight parameter of a hook point's layer."""
    return model.get_submodule(point.layer).weight  # type: ignore[return-value]


def as_filters(model: nn.Module, point: HookPoint, weight: Tensor) -> Tensor:
    """A weight, or its gradient, with a layer's outputs on the first axis: that of a transposed convolution is turned.

    Args:
        model: the network.
        point: a hook point of the layer.
        weight: shaped as the layer's weight.

    Returns:
        (out, in / groups, ...).
    """
    layer = model.get_submodule(point.layer)
    if not isinstance(layer, nn.ConvTranspose2d):
        return weight
    return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)


def collect_batch(
    model: nn.Module,
    points: Sequence[HookPoint],
    accumulator: Accumulator,
    batch: Batch,
    positions: Tensor,
    task: Task | None,
) -> None:
    """Run one micro-batch through a network and add it to the tables of a statistic.

    Args:
        model: the network, in the mode that it is to run in. Its parameters' ``.grad`` stays as it was.
        points: hook points of the statistic.
        accumulator: the tables, updated in place.
        batch: k images, and their targets if there is a task, on the device.
        positions: (k,) int64 positions of the images in the calibration list, on the device.
        task: also compute the gradient of its loss, summed over the images, at each hook point; None: no gradients.
    """
    if task is None:
        with (
            torch.no_grad(),
            capture_outputs(
                model, points, lambda point, maps: accumulator.update(point, fold_units(point, maps), positions)
            ),
        ):
            model(batch.images)
        return
    captured: list[tuple[HookPoint, Tensor]] = []

    def capture(point: HookPoint, maps: Tensor) -> Tensor:
        copy = maps.clone()  # the network continues with a copy: an in-place activation must not touch the maps
        captured.append((point, copy if point.side == "in" else maps))  # the layer's input, not a shortcut around it
        return copy

    hooked = [point for point in points if point.side != "weight"]
    with torch.enable_grad(), capture_outputs(model, hooked, capture):
        # gradients are taken at the hook points only: the parameters' own .grad stays as it was
        batch.images.requires_grad_(True)
        loss = task.loss(task.forward(model, batch), batch).sum()
        captured += [(point, layer_weight(model, point)) for point in points if point.side == "weight"]
        grads = gradients(loss, captured, accumulator.statistic, positions)
    with torch.no_grad():
        for (point, maps), grad in zip(captured, grads, strict=True):
            if point.side == "weight":
                maps, grad = as_filters(model, point, maps), as_filters(model, point, grad)
            accumulator.update(point, fold_units(point, maps.detach()), positions, fold_units(point, grad))


class Observation:
    """The tables of one call of ``collect``: of this rank since the last save, and merged over all ranks.

    Args:
        statistic: what is computed.
        points: hook points, each name once.
        images: number of calibration images.
        device: where the tables are.
        comm: all ranks; they call ``save`` and ``load`` together.
        file: where the merged tables are saved, or None.
        settings: everything else that decides the tables: a file with other settings is not used.
    """

    def __init__(
        self,
        statistic: Statistic,
        points: Sequence[HookPoint],
        images: int,
        device: torch.device,
        comm: Communicator,
        file: Path | None,
        settings: tuple[Any, ...],
    ):
        self.points, self.comm = points, comm
        self.local, self.merged = (Accumulator(statistic, points, images, device) for _ in range(2))
        attributes = {name: repr(value) for name, value in sorted(vars(statistic).items())}
        names = [point.name for point in points]
        identity = identity_of(*settings, images, first_class_name(statistic), attributes, names)
        self.state = ResumableState(file, identity, comm)

    @property
    def tables(self) -> dict[str, dict[str, Tensor]]:
        """Hook point name -> state name -> merged table, on the CPU."""
        merged = self.merged.tables
        return {point: {name: table.cpu() for name, table in tables.items()} for point, tables in merged.items()}

    def update(self, model: nn.Module, batch: Batch, positions: Tensor, task: Task | None) -> None:
        """Add one micro-batch to this rank's tables; arguments as in ``collect_batch``."""
        collect_batch(model, self.points, self.local, batch, positions, task)

    def save(self, done: int) -> None:
        """Merge the tables of all ranks, one collective per reduction and dtype, and save them.

        Args:
            done: number of micro-batches, over all ranks, that the tables hold then.

        Raises:
            PruneError: the disk refuses.
        """
        for (reduction, _), tables in self.local.reduction_buckets().items():
            self.comm.all_reduce(reduction, tables)
        self.merged.merge(self.local)
        self.local.reset()
        self.state.save(self.merged.state_dict(), micro_batches=done)

    def load(self, say: Callable[[str], None]) -> int:
        """Load the merged tables of an earlier, stopped process.

        Args:
            say: tells the user about a damaged file.

        Returns:
            Number of micro-batches that the tables hold; 0 if there is no file of this observation.
        """

        def damaged() -> None:
            say(f"  score: {self.state.file} is damaged and is not used; scoring starts over")

        tables, meta = self.state.load(damaged)
        if not meta:
            return 0
        self.merged.load_state_dict(tables)
        return int(meta["micro_batches"])

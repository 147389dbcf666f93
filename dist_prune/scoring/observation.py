"""One observation: a statistic of the calibration images, folded over ranks and kept in a file from time to time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.config.compatibility import first_class_name
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.resumable_state import ResumableState, identity_of
from dist_prune.pruning.graph.groups import HookPoint
from dist_prune.pruning.graph.head_groups import fold_units
from dist_prune.pruning.hooks.capture import capture_outputs
from dist_prune.pruning.hooks.statistics import Accumulator, Statistic, gradients


def layer_weight(model: nn.Module, point: HookPoint) -> nn.Parameter:
    """The weight of a site's layer."""
    return model.get_submodule(point.layer).weight  # type: ignore[return-value]


def collect_batch(
    model: nn.Module,
    points: Sequence[HookPoint],
    accumulator: Accumulator,
    images: Tensor,
    labels: Tensor,
    positions: Tensor,
    backward: bool,
) -> None:
    """One micro-batch into a tally, with gradients of the summed cross-entropy where ``backward``."""
    if not backward:
        with (
            torch.no_grad(),
            capture_outputs(
                model, points, lambda point, maps: accumulator.update(point, fold_units(point, maps), positions)
            ),
        ):
            model(images)
        return
    seen: list[tuple[HookPoint, Tensor]] = []

    def note(point: HookPoint, maps: Tensor) -> Tensor:
        copy = maps.clone()  # the network goes on with a copy: an in-place activation must not touch the maps
        seen.append((point, copy if point.side == "in" else maps))  # what enters a layer, and no shortcut around it
        return copy

    tapped = [point for point in points if point.side != "weight"]
    with torch.enable_grad(), capture_outputs(model, tapped, note):
        # gradients are asked for at the sites alone: the parameters' own .grad stays as it was
        logits = model(images.requires_grad_(True))
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        seen += [(point, layer_weight(model, point)) for point in points if point.side == "weight"]
        grads = gradients(loss, seen, accumulator.statistic, positions)
    with torch.no_grad():
        for (point, maps), grad in zip(seen, grads, strict=True):
            accumulator.update(point, fold_units(point, maps.detach()), positions, fold_units(point, grad))


class Observation:
    """Tables of this rank (``local``) and of all ranks (``merged``, the same on every rank).

    Args:
        statistic, points: what is gathered, and where.
        images: number of calibration images.
        file: where the merged tables are kept, or None.
        asked: everything else that decides them: the file must have been made for the same.
    """

    def __init__(
        self, statistic: Statistic, points: Sequence[HookPoint], images: int, device: torch.device, comm: Communicator,
        file: Path | None, asked: tuple[Any, ...],
    ):  # fmt: skip
        self.points, self.comm = points, comm
        self.local, self.merged = (Accumulator(statistic, points, images, device) for _ in range(2))
        settings = {name: repr(value) for name, value in sorted(vars(statistic).items())}
        names = [point.name for point in points]
        identity = identity_of(*asked, images, first_class_name(statistic), settings, names)
        self.state = ResumableState(file, identity, comm)

    @property
    def tables(self) -> dict[str, dict[str, Tensor]]:
        """Site name -> state name -> merged table, on the CPU."""
        found = self.merged.tables
        return {site: {name: table.cpu() for name, table in tables.items()} for site, tables in found.items()}

    def update(self, model: nn.Module, images: Tensor, labels: Tensor, positions: Tensor, backward: bool) -> None:
        """One micro-batch into this rank's tables."""
        collect_batch(model, self.points, self.local, images, labels, positions, backward)

    def save(self, done: int) -> None:
        """Fold all ranks' tables, one collective per word and dtype, and keep them: ``done`` micro-batches are in."""
        for (word, _), tables in self.local.reduction_buckets().items():
            self.comm.all_reduce(word, tables)
        self.merged.merge(self.local)
        self.local.reset()
        self.state.save(self.merged.state_dict(), micro_batches=done)

    def load(self, say: Callable[[str], None]) -> int:
        """Micro-batches that the file already holds of this observation; 0 where there is none of this kind."""

        def damaged() -> None:
            say(f"  score: {self.state.file} is damaged and left aside; scoring starts over")

        tables, meta = self.state.load(damaged)
        if not meta:
            return 0
        self.merged.load_state_dict(tables)
        return int(meta["micro_batches"])

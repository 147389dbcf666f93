"""Sums over images that are the same bits for every number of ranks: by micro-batch, then added in their order."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.data.sampling import micro_batches, shard
from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.pruning.hooks.capture import reproducible_kernels
from dist_prune.training.tracking import Tracker


class OrderedSums:
    """Sums that hooks of a network add up while it runs over images.

    Args:
        shapes: name of a sum -> its shape.
        ids: (n,) int64 ids of the images, ascending.
        micro_batch: images that go through the network together.
        device: of the network.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], ids: np.ndarray, micro_batch: int, device: torch.device):
        self.lists = micro_batches(ids, micro_batch)
        self.tables = {
            name: torch.zeros((len(self.lists), *shape), dtype=torch.float64, device=device)
            for name, shape in shapes.items()
        }
        self._row = 0

    def add(self, name: str, values: Tensor) -> None:
        """Add to a sum of the present micro-batch; called by hooks."""
        self.tables[name][self._row] += values

    def run(
        self, model: nn.Module, loader: Any, comm: Communicator, what: str, tracker: Tracker | None = None
    ) -> dict[str, Tensor]:
        """Run a network in evaluation mode over all images. Collective.

        Args:
            model: whose hooks call ``add``; not changed.
            loader: of the images; labels are not read.
            comm: all ranks.
            what: what was under way, for the error of a stopped run: ``while norms were refitted``.
            tracker: shows progress; None: nothing is shown.

        Returns:
            Name -> float64 sum over all images, the same bits on every rank.

        Raises:
            PreemptedError: on every rank, if one of them was asked to stop.
        """
        own = shard(list(range(len(self.lists))), comm.rank, comm.world)
        batches = loader.batches([self.lists[number] for number in own])
        rounds = -(-len(self.lists) // comm.world)
        turns = range(rounds) if tracker is None else tracker.bar(range(rounds), rounds, what.removeprefix("while "))
        with torch.no_grad(), evaluation_mode(model), reproducible_kernels():
            for turn in turns:
                if preemption.poll(comm)[0]:
                    raise preemption.preempted_error(what)
                if turn < len(own):
                    self._row = own[turn]
                    model(next(batches).images)
        comm.all_reduce("rows", list(self.tables.values()))
        return {name: _added(table) for name, table in self.tables.items()}


def _added(table: Tensor) -> Tensor:
    """The sum of the rows, one after the other, whatever the number of ranks."""
    total = table[0].clone()
    for row in table[1:]:
        total += row
    return total

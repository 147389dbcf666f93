"""Recalibration of batch-norm statistics after surgery, with the same bits for every number of ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune.data.loader import ImageLoader
from dist_prune.data.sampling import micro_batches, shard
from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.training.tracking import Tracker


def recalibrate_bn(
    model: nn.Module,
    loader: ImageLoader,
    ids: np.ndarray,
    micro_batch: int,
    comm: Communicator,
    tracker: Tracker | None = None,
) -> int:
    """Set every batch norm's running mean and variance to the average over fixed micro-batches; a collective.

    Meanwhile each batch norm normalises by the statistics of its micro-batch, so micro-batches do not depend on one
    another. Their statistics are gathered by number and added in that order. Weights, modes and other layers stay as
    they are.

    Args:
        model: changed in place; on the loader's device.
        loader: the images.
        ids: (n,) the images to use.
        micro_batch: images of one forward pass.
        comm: all processes.
        tracker: for the progress; None: none.

    Returns:
        The number of batch norms.

    Raises:
        PreemptedError: on every rank, if one of them was asked to stop.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    }
    if not norms:
        return 0
    device = loader.device
    lists = micro_batches(ids, micro_batch)
    tables = {
        name: torch.zeros((len(lists), 2, module.num_features), dtype=torch.float64, device=device)
        for name, module in norms.items()
    }
    own = shard(list(range(len(lists))), comm.rank, comm.world)
    batches = loader.batches([lists[number] for number in own])
    with torch.no_grad(), batch_statistics(model), _record_statistics(norms, tables) as row:
        rounds = -(-len(lists) // comm.world)
        for round_number in (tracker or Tracker(False)).bar(range(rounds), rounds, "recalibrate batch norms"):
            if preemption.poll(comm)[0]:
                raise preemption.preempted_error("in finetune, while batch norms were recalibrated")
            if round_number < len(own):
                row[0] = own[round_number]
                model(next(batches).images)
    comm.all_reduce("rows", list(tables.values()))
    weights = torch.tensor([len(micro_batch_ids) for micro_batch_ids in lists], dtype=torch.float64, device=device)
    for name, module in norms.items():
        mean, var = (tables[name] * (weights / weights.sum())[:, None, None]).sum(0)
        module.running_mean.copy_(mean)  # type: ignore[union-attr]
        module.running_var.copy_(var)  # type: ignore[union-attr]
    return len(norms)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """A context in which batch norms use their batch's statistics without updating the running ones.

    All modules are in evaluation mode within it; their modes are restored at its end.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    norms: list[Any] = [module for module in modes if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    running = [(module.running_mean, module.running_var) for module in norms]
    for module in norms:
        module.running_mean = module.running_var = None  # without them eval mode normalises by the batch
    try:
        yield
    finally:
        for module, (mean, var) in zip(norms, running, strict=True):
            module.running_mean, module.running_var = mean, var
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _record_statistics(norms: dict[str, Any], tables: dict[str, Tensor]) -> Iterator[list[int]]:
    """A context that writes the input statistics of each batch norm to row ``row[0]`` of its table."""
    row, handles = [0], []
    for name, module in norms.items():

        def hook(_module: nn.Module, inputs: Any, named: Any, name: str = name) -> None:
            x = (inputs[0] if inputs else next(iter(named.values()))).double()
            dims = [d for d in range(x.dim()) if d != 1]
            count = x.numel() // x.shape[1]
            tables[name][row[0], 0] = x.mean(dims)
            tables[name][row[0], 1] = x.var(dims, unbiased=count > 1)

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield row
    finally:
        for handle in handles:
            handle.remove()


def freeze_batch_norms(model: nn.Module) -> None:
    """Let the batch norms of a network in training mode use and keep their running statistics."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()

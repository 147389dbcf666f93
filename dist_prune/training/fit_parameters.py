"""Train free parameters, such as gates, through the training loop; an interrupted training resumes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from dist_prune.training import optim
from dist_prune.training.checkpoints import CheckpointManager
from dist_prune.training.engine import TrainEngine
from dist_prune.training.loop import Loop, Losses, Progress, gradient_averager


def fit_parameters(
    parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
    losses_of: Losses,
    loop: Loop,
    watch: Callable[[int], None] = lambda step: None,
    checkpoints: CheckpointManager | None = None,
) -> list[dict[str, float]]:
    """Train parameters in place; every rank calls it, and gradients are averaged over the loop's ranks.

    Args:
        parameters: the parameters, or groups of them: dicts with ``params`` and ``lr_scale``, the factor of their
            learning rate.
        losses_of: (batch, epoch, step) -> (n,) losses of its images.
        loop: settings, images and ranks.
        watch: called after each update with its number from 0; on resuming, first with that of the last update.
        checkpoints: of parameters and optimizer, or None for none. The last one marks the training as finished.

    Returns:
        The figures of each epoch, see ``Loop.run_epoch``.

    Raises:
        PreemptedError: on every rank, after one of them was asked to stop; the state is saved.
        PruneError: the loss is not finite.
    """
    optimizer = optim.create_optimizer(parameters, loop.settings)
    flat_parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule = optim.LearningRate(optimizer, loop.settings, loop.steps_per_epoch)
    comm = loop.environment.comm
    engine = TrainEngine(loop.environment, optimizer, sync=gradient_averager(flat_parameters, comm))
    history: list[dict[str, float]] = []
    epoch, begin = 0, None

    def save(number: int, progress: Progress) -> None:
        assert checkpoints is not None
        state, plain = engine.state()
        tensors = {f"optimizer/{name}": tensor for name, tensor in state.items()}
        tensors |= {f"parameter/{i}": parameter for i, parameter in enumerate(flat_parameters)}
        meta = {"optimizer": plain, "history": history, "epoch": number, "progress": asdict(progress)}
        step = number * loop.steps_per_epoch + progress.step
        comm.run_on_main(lambda: checkpoints.save(step, tensors, meta))  # type: ignore[union-attr]

    if checkpoints is not None:
        loop.save = save
        loaded = checkpoints.load(comm)
        if loaded is not None:
            tensors, meta = loaded
            with torch.no_grad():
                for i, parameter in enumerate(flat_parameters):
                    parameter.copy_(tensors.pop(f"parameter/{i}"))
            engine.load_state({name.removeprefix("optimizer/"): t for name, t in tensors.items()}, meta["optimizer"])
            history = meta["history"]
            epoch = meta["epoch"]
            begin = Progress(**meta["progress"])
            watch(epoch * loop.steps_per_epoch + begin.step - 1)
    while epoch < loop.settings.epochs:
        history.append({"epoch": epoch + 1, **loop.run_epoch(epoch, losses_of, engine, schedule, watch, begin)})
        epoch, begin = epoch + 1, None
        if checkpoints is not None:
            save(epoch, Progress())
    if checkpoints is not None:
        comm.run_on_main(checkpoints.wait)
    return history

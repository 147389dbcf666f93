"""Train loose parameters (gates) of a bare model through the one loop, and go on where a stopped training was."""

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
    """The epochs' figures; gradients are averaged over the loop's ranks.

    Args:
        parameters: or groups of them: dicts with ``params`` and ``lr_scale``, the factor of their learning rate.
        losses_of: see Loop.
        watch: called after each update with its number; where a stopped training goes on, first with that of its last
            one.
        checkpoints: checkpoints of parameters and optimizer; the last one says that the training is done.
    """
    optimizer = optim.create_optimizer(parameters, loop.settings)
    loose = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule = optim.LearningRate(optimizer, loop.settings, loop.steps_per_epoch)
    comm = loop.environment.comm
    engine = TrainEngine(loop.environment, optimizer, sync=gradient_averager(loose, comm))
    history: list[dict[str, float]] = []
    epoch, begin = 0, None

    def save(number: int, progress: Progress) -> None:
        assert checkpoints is not None
        kept, plain = engine.state()
        tensors = {f"optimizer/{name}": tensor for name, tensor in kept.items()}
        tensors |= {f"parameter/{i}": parameter for i, parameter in enumerate(loose)}
        meta = {"optimizer": plain, "history": history, "epoch": number, "progress": asdict(progress)}
        step = number * loop.steps_per_epoch + progress.step
        comm.run_on_main(lambda: checkpoints.save(step, tensors, meta))  # type: ignore[union-attr]

    if checkpoints is not None:
        loop.save = save
        loaded = checkpoints.load(comm)
        if loaded is not None:
            tensors, meta = loaded
            with torch.no_grad():
                for i, parameter in enumerate(loose):
                    parameter.copy_(tensors.pop(f"parameter/{i}"))
            engine.load_state({name.removeprefix("optimizer/"): t for name, t in tensors.items()}, meta["optimizer"])
            history, epoch, begin = meta["history"], meta["epoch"], Progress(**meta["progress"])
            watch(epoch * loop.steps_per_epoch + begin.step - 1)
    while epoch < loop.settings.epochs:
        history.append({"epoch": epoch + 1, **loop.run_epoch(epoch, losses_of, engine, schedule, watch, begin)})
        epoch, begin = epoch + 1, None
        if checkpoints is not None:
            save(epoch, Progress())
    if checkpoints is not None:
        comm.run_on_main(checkpoints.wait)
    return history

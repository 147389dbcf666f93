"""Train loose parameters (gates) of a bare model through the one loop, and go on where a stopped training was."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from dist_prune.runtime.training import optim
from dist_prune.runtime.training.drive import Drive
from dist_prune.runtime.training.loop import Loop, Losses, Progress, averaging
from dist_prune.runtime.training.states import States


def fit(
    parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
    losses_of: Losses,
    loop: Loop,
    watch: Callable[[int], None] = lambda step: None,
    states: States | None = None,
) -> list[dict[str, float]]:
    """The epochs' figures; gradients are averaged over the loop's ranks.

    Args:
        parameters: or groups of them: dicts with ``params`` and ``lr_scale``, the factor of their learning rate.
        losses_of: see Loop.
        watch: called after each update with its number; where a stopped training goes on, first with that of its last
            one.
        states: checkpoints of parameters and optimizer; the last one says that the training is done.
    """
    optimizer = optim.optimizer(parameters, loop.settings)
    loose = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule = optim.Schedule(optimizer, loop.settings, loop.steps)
    ranks = loop.machine.ranks
    drive = Drive(loop.machine, optimizer, sync=averaging(loose, ranks))
    history: list[dict[str, float]] = []
    epoch, begin = 0, None

    def save(number: int, progress: Progress) -> None:
        assert states is not None
        kept, plain = drive.pack()
        tensors = {f"optimizer/{name}": tensor for name, tensor in kept.items()}
        tensors |= {f"parameter/{i}": parameter for i, parameter in enumerate(loose)}
        meta = {"optimizer": plain, "history": history, "epoch": number, "progress": asdict(progress)}
        step = number * loop.steps + progress.step
        ranks.together(lambda: states.save(step, tensors, meta))  # type: ignore[union-attr]

    if states is not None:
        loop.save = save
        loaded = states.load(ranks)
        if loaded is not None:
            tensors, meta = loaded
            with torch.no_grad():
                for i, parameter in enumerate(loose):
                    parameter.copy_(tensors.pop(f"parameter/{i}"))
            drive.unpack({name.removeprefix("optimizer/"): t for name, t in tensors.items()}, meta["optimizer"])
            history, epoch, begin = meta["history"], meta["epoch"], Progress(**meta["progress"])
            watch(epoch * loop.steps + begin.step - 1)
    while epoch < loop.settings.epochs:
        history.append({"epoch": epoch + 1, **loop.run_epoch(epoch, losses_of, drive, schedule, watch, begin)})
        epoch, begin = epoch + 1, None
        if states is not None:
            save(epoch, Progress())
    if states is not None:
        ranks.together(states.wait)
    return history

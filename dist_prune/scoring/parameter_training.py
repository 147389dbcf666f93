"""Training of free parameters (gates) around a dense network that stays as it is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dist_prune.config.training import Training
from dist_prune.data.loader import Batch
from dist_prune.pruning.eval_mode import evaluation_mode
from dist_prune.training.bn_recalibration import batch_statistics
from dist_prune.training.checkpoints import CheckpointManager
from dist_prune.training.fit_model import Loss
from dist_prune.training.fit_parameters import fit_parameters
from dist_prune.training.loop import Loop

GATE_DEFAULTS = {"weight_decay": 0.0, "schedule": "constant", "decay_norm_bias": True}


def training_settings(epochs: int, lr: float, batch: int, training: Mapping[str, Any]) -> Training:
    """The settings of a training that a method asks for.

    Args:
        epochs: passes over the images.
        lr: learning rate before any decay.
        batch: images per update, over all ranks.
        training: further keys of the recipe's ``train`` section. Without them there is no weight decay, and the
            learning rate is constant.

    Raises:
        pydantic.ValidationError: a key is unknown, or its value is not allowed.
    """
    return Training(epochs=epochs, lr=lr, batch=batch, **{**GATE_DEFAULTS, **training})


def train_free_parameters(
    model: nn.Module,
    parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
    loss: Loss,
    loop: Loop,
    watch: Callable[[int], Any],
    checkpoints: CheckpointManager | None,
    train_mode: bool,
) -> list[dict[str, float]]:
    """Train parameters in place; weights, buffers, mode and ``.grad`` of the network are as before afterwards.

    Args:
        model: the dense network.
        parameters: the parameters, or groups of them: dicts with ``params`` and ``lr_scale``. They may be parameters
            of ``model``.
        loss: ``loss(model, images, labels, ids)`` gives the (k,) losses of a batch.
        loop: settings, images and ranks.
        watch: called after each update with its number, from 0.
        checkpoints: where the training is saved, and resumed from; None: nowhere.
        train_mode: batch norms use the statistics of their batch; running statistics stay as they are.

    Returns:
        The figures of each epoch.
    """

    def losses_of(batch: Batch, _epoch: int, _step: int) -> Tensor:
        return loss(model, batch.images, batch.labels, batch.ids)

    groups = [group["params"] if isinstance(group, dict) else (group,) for group in parameters]
    trained = {id(parameter) for group in groups for parameter in group}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in trained]
    try:
        for parameter in frozen:  # without a gradient, which is faster and leaves .grad as it was
            parameter.requires_grad_(False)
        with batch_statistics(model) if train_mode else evaluation_mode(model):
            return fit_parameters(parameters, losses_of, loop, watch, checkpoints)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)

"""The training engine: gradients and updates on all ranks of a bare model or one wrapped by accelerate's DDP.

deepspeed_engine.py has the engine for DeepSpeed.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import DistributedEnvironment, nbytes


class TrainEngine:
    """Gradients, updates and optimizer state of one training. All ranks call its methods in the same order.

    Attributes:
        environment: device and ranks.
        optimizer: the torch optimizer; a schedule sets its learning rates.
        model: the bare model, or None if parameters are trained without their model.
        forward: the module for the forward pass: the wrapped model if there is a wrapper.
        penalty: called before each update, to add to the gradients after they are averaged over the ranks.
    """

    def __init__(
        self,
        environment: DistributedEnvironment,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None = None,
        forward: nn.Module | None = None,
        sync: Callable[[], None] | None = None,
        scaled: bool = False,
    ):
        """Make an engine.

        Args:
            environment: device and ranks.
            optimizer: of the parameters of ``model``.
            model: the bare model, or None.
            forward: the wrapped model (default: ``model``).
            sync: averages the gradients over the ranks if no wrapper does.
            scaled: whether losses are scaled, for fp16.
        """
        self.environment = environment
        self.optimizer = optimizer
        self.model = model
        self.forward: Any = model if forward is None else forward  # a compiled module has no truth value
        self._sync = sync or (lambda: None)
        self._scaler = GradScaler(environment.device.type) if scaled else None
        self.penalty: Callable[[], None] = lambda: None

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """A context for the forward and backward pass of one micro-batch.

        Args:
            last: whether it is the last of its batch; gradients are averaged over the ranks in this one only.
        """
        no_sync = getattr(self.forward, "no_sync", None)  # DDP only
        if no_sync is not None and last and self.model is not None:
            comm, parameters = self.environment.comm, self.model.parameters()
            comm.traffic("gradients", sum(nbytes(p) for p in parameters if p.requires_grad))
            comm.traffic("buffers", sum(map(nbytes, self.model.buffers())))  # before the first forward pass of a batch
        return no_sync() if no_sync is not None and not last else contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the parameters.

        Args:
            loss: () tensor.
        """
        self.environment.backward(self._scaler.scale(loss) if self._scaler is not None else loss)

    def step(self, limit: float | None, measured: bool) -> float | Tensor | None:
        """Update the weights by the gradients.

        Args:
            limit: largest norm of all gradients together, to which they are clipped; None for no limit.
            measured: whether the norm is wanted without a limit.

        Returns:
            The gradient norm before clipping, a number or a () tensor on the device; None if it was neither limited
            nor measured.
        """
        self._sync()
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        self.penalty()
        norm = None
        if limit is not None or measured:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            if limit is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        if self._scaler is not None:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        else:
            self.optimizer.step()
        return norm  # not read here, which would wait for the whole update

    @torch.no_grad()
    def apply_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Multiply weights and the optimizer's states of their shape by masks, so that masked ones are exact zeros.

        Args:
            masks: name of a parameter -> 0/1 tensor of its shape.
        """
        assert self.model is not None
        named = dict(self.model.named_parameters())
        for name, mask in masks.items():
            parameter = named[name]
            mask = mask.to(parameter.device, parameter.dtype)
            parameter.mul_(mask)
            for value in self.optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    value.mul_(mask)

    def full_weights(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which ``model`` has its full weights; ZeRO-3 shards them otherwise."""
        return contextlib.nullcontext()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state of optimizer and scaler; a collective under DeepSpeed, so every rank calls it.

        Returns:
            ``<number of the parameter>.<key>`` -> tensor of its full shape, and JSON values: ``state``, ``groups``,
            ``scaler``.
        """
        tensors, plain = tensor_files.pack_optimizer(self.optimizer)
        return tensors, {**plain, "scaler": self._scaler.state_dict() if self._scaler is not None else None}

    def load_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Load a state of ``state``, also one of another kind of engine; every rank calls it.

        Args:
            tensors: ``<number of the parameter>.<key>`` -> tensor.
            plain: the JSON values.
        """
        tensor_files.unpack_optimizer(self.optimizer, tensors, plain)
        if self._scaler is not None and plain.get("scaler"):
            self._scaler.load_state_dict(plain["scaler"])

    def close(self) -> None:
        """End the training: afterwards the model is bare and has its full weights."""

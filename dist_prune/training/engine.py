"""How gradients become updates on all ranks: a bare model, or one wrapped by accelerate's DDP. (zero.py: DeepSpeed.)"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from dist_prune.distributed import tensor_files
from dist_prune.distributed.environment import DistributedEnvironment, nbytes


class TrainEngine:
    """Gradients, updates and optimizer state of one training.

    Attributes:
        forward: what the forward pass calls (the wrapped model where there is a wrapper).
        optimizer: the torch optimizer; a schedule sets its learning rates.
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
        """``sync`` averages gradients over ranks where no wrapper does; ``scaled``: fp16 with scaled losses."""
        self.environment, self.optimizer, self.model = environment, optimizer, model
        self.forward: Any = model if forward is None else forward  # a compiled module has no truth value
        self._sync = sync or (lambda: None)
        self._scaler = GradScaler(environment.device.type) if scaled else None
        self.penalty: Callable[[], None] = lambda: None  # adds to the gradients that ranks have averaged

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward pass of one piece of a batch; gradients are exchanged in the last one."""
        alone = getattr(self.forward, "no_sync", None)  # only DDP has it
        if alone is not None and last and self.model is not None:
            comm, parameters = self.environment.comm, self.model.parameters()
            comm.traffic("gradients", sum(nbytes(p) for p in parameters if p.requires_grad))
            comm.traffic("buffers", sum(map(nbytes, self.model.buffers())))  # before the first forward pass of a batch
        return alone() if alone is not None and not last else contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``; over ranks they are averaged."""
        self.environment.backward(self._scaler.scale(loss) if self._scaler is not None else loss)

    def step(self, limit: float | None, measured: bool) -> float | Tensor | None:
        """One update of the weights. ``limit``: largest gradient norm. The norm, where it is limited or measured; it
        may still lie on the device."""
        self._sync()
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        self.penalty()
        length = None
        if limit is not None or measured:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            length = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            if limit is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, length)
        if self._scaler is not None:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        else:
            self.optimizer.step()
        return length  # not read here: that would be waiting for the whole update

    @torch.no_grad()
    def apply_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Exact zeros under the masks, in the weights and in whatever the optimizer remembers of them."""
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
        """Within it, ``model`` has its whole weights (they are sharded under ZeRO-3)."""
        return contextlib.nullcontext()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Optimizer and scaler as tensors (parameter's number.key) and plain values; called on every rank."""
        tensors, plain = tensor_files.pack_optimizer(self.optimizer)
        return tensors, {**plain, "scaler": self._scaler.state_dict() if self._scaler is not None else None}

    def load_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Take back what ``pack`` gave, also that of another kind of drive."""
        tensor_files.unpack_optimizer(self.optimizer, tensors, plain)
        if self._scaler is not None and plain.get("scaler"):
            self._scaler.load_state_dict(plain["scaler"])

    def close(self) -> None:
        """The model is bare and whole again."""

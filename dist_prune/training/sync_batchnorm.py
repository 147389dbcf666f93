"""Batch norms over the batches of all ranks: on any device, differentiable, for every class of batch norm."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dist_prune.distributed.communicator import Communicator


class CrossRankBatchNorm(TorchFunctionMode):
    """A context in which ``functional.batch_norm`` in training mode normalises by the statistics over all ranks.

    Each such call and its backward pass is a collective: every rank has to run the same layers in the same order. A
    rank may have an empty batch. Running statistics become the same on all ranks.

    Args:
        comm: all processes.
    """

    def __init__(self, comm: Communicator):
        super().__init__()
        self._comm = comm

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.batch_norm:
            return _batch_norm(self._comm, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    comm: Communicator,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """A ``torch.nn.functional.batch_norm`` with one all-reduce of means and squared deviations in float64."""
    if not training:
        return torch.batch_norm(
            input, weight, bias, running_mean, running_var, False, momentum, eps, torch.backends.cudnn.enabled
        )
    dims = [d for d in range(input.dim()) if d != 1]
    shape = [1, -1] + [1] * (input.dim() - 2)
    size = input.numel() // input.shape[1]
    own = input.sum(dims) / max(size, 1)
    squares = (input - own.view(shape)).square().sum(dims).double()
    own = own.double()
    sums = _Sum.apply(torch.cat([own * size, squares + own * own * size, own.new_full((1,), size)]), comm)
    count = sums[-1].detach()
    wide, raw = (sums[:-1] / count).chunk(2)
    mean, variance = wide.to(input.dtype), (raw - wide * wide).clamp(min=0).to(input.dtype)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
            unbiased = variance.detach() * (count / (count - 1).clamp(min=1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    out = (input - mean.view(shape)) * scale.view(shape)
    return out if bias is None else out + bias.view(shape)


class _Sum(torch.autograd.Function):
    """The sum over ranks; its gradient is a sum over ranks too, since the loss of every rank depends on it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, comm: Communicator) -> Any:
        ctx.comm = comm
        total = tensor.clone()
        comm.all_reduce("sum", [total])
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total = grads[0].clone()
        ctx.comm.all_reduce("sum", [total])
        return total, None

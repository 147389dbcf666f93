"""What the pretend device has to bring beside the CPU's kernels: autocast, and the operations of torch's SyncBatchNorm.

The latter are CUDA's alone in torch; here they are written with tensor operations.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOWER = ("conv2d", "conv1d", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm")
FULL = ("softmax.int", "log_softmax.int", "cross_entropy_loss", "nll_loss", "layer_norm", "group_norm")
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

_kept: list[Any] = []  # a library that is forgotten takes its kernels back


def register(library: Any) -> None:
    """All of them; what autocast does not know runs as it is."""
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _kept.append(others)
    for name in LOWER:
        library.impl(name, _cast(name, lambda: torch.get_autocast_dtype("pretend")), "AutocastPrivateUse1")
    for name in FULL:
        library.impl(name, _cast(name, lambda: torch.float32), "AutocastPrivateUse1")
    for kernel in (
        batch_norm_stats, batch_norm_gather_stats_with_counts, batch_norm_elemt, batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    ):  # fmt: skip
        library.impl(kernel.__name__, kernel, "CPU")


def _cast(name: str, dtype: Callable[[], torch.dtype]) -> Callable[..., Any]:
    """The operation on floating-point tensors of the device in another precision, as CUDA's autocast lists it."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def run(*args: Any, **kwargs: Any) -> Any:
        wanted = dtype()

        def cast(value: Any) -> Any:
            able = isinstance(value, Tensor) and value.is_floating_point() and value.device.type == "pretend"
            return value.to(wanted) if able and value.dtype != torch.float64 else value

        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return operation(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})

    return run


def _apart(x: Tensor) -> list[int]:
    """All axes but the channels'."""
    return [axis for axis in range(x.dim()) if axis != 1]


def _along(values: Tensor, x: Tensor) -> Tensor:
    """(C,) values, to be combined with (N, C, ...)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(C,) mean and 1 / sqrt(variance + eps) of this rank's batch."""
    return x.mean(_apart(x)), (x.var(_apart(x), unbiased=False) + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    x: Tensor, mean: Tensor, invstd: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float,
    eps: float, counts: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(C,) mean and 1 / sqrt(variance + eps) over ranks, of the (ranks, C) that each has; moves the running ones."""
    share, total = (counts / counts.sum())[:, None], counts.sum()
    whole = (share * mean).sum(0)
    variance = (share * (invstd.pow(-2) - eps + (mean - whole) ** 2)).sum(0)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(whole, momentum)
        running_var.lerp_(variance * (total / (total - 1)), momentum)
    return whole, (variance + eps).rsqrt()


def batch_norm_elemt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    """The normalised batch."""
    out = (x - _along(mean, x)) * _along(invstd if weight is None else invstd * weight, x)
    return out if bias is None else out + _along(bias, x)


def batch_norm_backward_reduce(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, *_wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(C,) sums over this rank's batch that the gradients need."""
    total, product = grad.sum(_apart(x)), (grad * (x - _along(mean, x))).sum(_apart(x))
    return total, product, product * invstd, total.clone()


def batch_norm_backward_elemt(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, total: Tensor, product: Tensor,
    counts: Tensor,
) -> Tensor:  # fmt: skip
    """The gradient at the input, of sums over all ranks."""
    count = counts.sum()
    centred = (x - _along(mean, x)) * _along(invstd.square() * product / count, x)
    scale = invstd if weight is None else invstd * weight
    return (grad - _along(total / count, x) - centred) * _along(scale, x)

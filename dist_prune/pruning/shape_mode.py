"""Run a network for the shapes of its tensors: costly operations on images without values are not computed.

torch's meta device gives shapes as well. Its first operation imports torch's compiler and sympy, which takes seconds.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
NEED_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
NORMS = {ATEN.native_batch_norm.default, ATEN.cudnn_batch_norm.default}
COSTLY = {ATEN.convolution.default, ATEN.mm.default, ATEN.addmm.default, *NORMS}


class NeedsValuesError(Exception):
    """The network looks at values, or runs an operation that is not torch's: its shapes need a pass with values."""


class ShapeMode(TorchDispatchMode):
    """In its ``with`` block convolutions, batch norms and matrix products of NaN give NaN of the right shape.

    A network is run on images of NaN. All that it makes of them is NaN, and what it makes of anything else (tables of
    positions, which it may keep) is computed as always, like every other operation: views and layouts in memory are
    those of the network. Autograd records what it always does. Batch norms do not update their statistics.

    Raises:
        NeedsValuesError: in the block, by an operation whose result depends on values.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to keep it away from __torch_dispatch__

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Answer one operation."""
        if func in COSTLY and not kwargs and (answer := _without_values(func, args)) is not None:
            return answer
        needs = func.namespace not in ("aten", "prims") or not NEED_VALUES.isdisjoint(func.tags)
        if needs and (func is not ATEN.index.Tensor or _picks_by_value(args[1])):
            raise NeedsValuesError(f"{func} needs the values of its inputs")
        return func(*args, **(kwargs or {}))


def _without_values(func: Any, args: Sequence[Any]) -> Any:
    """The answer to a costly operation on a tensor without values; None if it has to be computed."""
    source: Tensor = args[1] if func is ATEN.addmm.default else args[0]
    if not _is_missing(source):
        return None
    if func in NORMS:
        if source.dim() < 2 or any(t is not None and t.numel() != source.shape[1] for t in args[1:5]):
            return None
        statistics = [source.new_empty(0) for _ in range(len(func._schema.returns) - 1)]
        return torch.full_like(source, torch.nan), *statistics
    shape = _shape_of_convolution(*args) if func is ATEN.convolution.default else _shape_of_product(*args[-2:])
    if shape is None:
        return None
    made = source.new_empty(tuple(shape))
    last = source.dim() == 4 and not source.is_contiguous()
    if last and source.is_contiguous(memory_format=torch.channels_last):
        made = made.contiguous(memory_format=torch.channels_last)
    return made.fill_(torch.nan)


def _is_missing(tensor: Tensor) -> bool:
    """Whether the first or the last value is NaN: a token of the network's own may stand in front of the images'."""
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    ends = (tensor[(place,) * tensor.dim()] for place in (0, -1))
    return any(math.isnan(float(end)) for end in ends)


def _shape_of_convolution(
    maps: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> list[int] | None:
    """The output's shape; None if the operation itself had better say what is wrong."""
    out, per_group = weight.shape[:2]
    taken = out if transposed else per_group * groups
    given = per_group * groups if transposed else out
    same = maps.dtype == weight.dtype and maps.dim() == weight.dim() and maps.is_floating_point()
    if not same or maps.shape[1] != taken or taken % groups or given % groups:
        return None
    if bias is not None and (bias.shape != (given,) or bias.dtype != weight.dtype):
        return None
    sides = []
    for number, (side, kernel) in enumerate(zip(maps.shape[2:], weight.shape[2:], strict=True)):
        step, pad, reach = (values[number if len(values) > 1 else 0] for values in (stride, padding, dilation))
        span = reach * (kernel - 1) + 1
        if transposed:
            more = output_padding[number if len(output_padding) > 1 else 0]
            sides.append((side - 1) * step - 2 * pad + span + more)
        else:
            sides.append((side + 2 * pad - span) // step + 1)
    return [len(maps), given, *sides] if min(sides, default=1) > 0 else None


def _shape_of_product(left: Tensor, right: Tensor) -> tuple[int, int] | None:
    fits = left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0] and left.dtype == right.dtype
    return (len(left), right.shape[1]) if fits and left.is_floating_point() else None


def _picks_by_value(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)

"""The window of a convolution: which positions of its input each position of its output reads, tap by tap."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Pair = tuple[int, int]
Padding = Literal["constant", "reflect", "replicate", "circular"]
_NOTHING = slice(0, 0), slice(0, 0)


@dataclass(frozen=True)
class Window:
    """Kernel, stride and padding of a convolution, or of a transposed one.

    A convolution's output at q reads, with tap t, its padded input at ``q stride + t dilation``. A transposed
    convolution's output at q reads its input at p where ``p stride + t dilation - padding = q``, if there is such a p.

    Attributes:
        kernel: (kh, kw).
        stride: of both axes.
        dilation: of both axes.
        padding: (left, right, top, bottom). Of a transposed convolution, rows and columns that are cut off the output.
        mode: what is padded with.
        transposed: whether it is a transposed convolution.
    """

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    mode: Padding = "constant"
    transposed: bool = False

    @classmethod
    def of(cls, module: Any, before: Sequence[int], after: Sequence[int]) -> "Window":
        """The window of a module, as its call shows.

        Args:
            module: ``nn.Conv2d`` or ``nn.ConvTranspose2d``, perhaps of a class that pads by itself.
            before: (H, W) of its input.
            after: (H, W) of its output.
        """
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        if isinstance(module, nn.ConvTranspose2d):
            top, left = (int(p) for p in module.padding)  # type: ignore[union-attr]
            full = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(before, stride, dilation, kernel, strict=True)]
            bottom, right = full[0] - top - after[0], full[1] - left - after[1]  # negative with output_padding
            return cls(kernel, stride, dilation, (left, right, top, bottom), "constant", True)
        left, right, top, bottom = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        window = cls(kernel, stride, dilation, (left, right, top, bottom), mode)
        if window.output(before) != tuple(after):  # a class that pads by itself, as TensorFlow's "same" does
            sides = [
                max((o - 1) * s + d * (k - 1) + 1 - n, 0)
                for o, s, d, k, n in zip(after, stride, dilation, kernel, before, strict=True)
            ]
            (top, bottom), (left, right) = ((side // 2, side - side // 2) for side in sides)
            window = cls(kernel, stride, dilation, (left, right, top, bottom), mode)
        return window

    @property
    def taps(self) -> int:
        """Entries of the kernel."""
        return self.kernel[0] * self.kernel[1]

    def output(self, size: Sequence[int]) -> Pair:
        """(H, W) of the output of an input of ``size``."""
        left, right, top, bottom = self.padding
        found = []
        for axis, cut in ((0, top + bottom), (1, left + right)):
            reach = self.dilation[axis] * (self.kernel[axis] - 1)
            if self.transposed:
                found.append((size[axis] - 1) * self.stride[axis] + reach + 1 - cut)
            else:
                found.append((size[axis] + cut - reach - 1) // self.stride[axis] + 1)
        return found[0], found[1]

    def read(self, maps: Tensor) -> Tensor:
        """What each output position reads.

        Args:
            maps: (n, C, H, W).

        Returns:
            (C, taps, n, H', W') float64, tap by tap as the entries of the kernel; 0 where a tap reads nothing.
        """
        height, width = self.output(maps.shape[2:])
        shape = (maps.shape[1], self.taps, len(maps), height, width)
        make = torch.zeros if self.transposed else torch.empty
        out = make(shape, dtype=torch.float64, device=maps.device)
        if not self.transposed and any(self.padding):
            maps = functional.pad(maps, self.padding, mode=self.mode)
        for tap, (rows, columns), (out_rows, out_columns) in self._slices(maps.shape[2:], (height, width)):
            out[:, tap, :, out_rows, out_columns].copy_(maps[:, :, rows, columns].transpose(0, 1))
        return out

    def _slices(
        self, size: Sequence[int], output: Pair
    ) -> Iterator[tuple[int, tuple[slice, slice], tuple[slice, slice]]]:
        """For each tap the slices of the (padded) input that it reads, and those of the output that read it."""
        sides = []
        for axis, before in ((0, self.padding[2]), (1, self.padding[0])):
            own, stride = [], self.stride[axis]
            for tap in range(self.kernel[axis]):
                start = tap * self.dilation[axis]
                if not self.transposed:
                    stop = start + (output[axis] - 1) * stride + 1
                    own.append((slice(start, stop, stride), slice(None)))
                    continue
                shift = start - before  # input p is read by output p stride + shift
                first = max(0, -(shift // stride))
                last = min(size[axis] - 1, (output[axis] - 1 - shift) // stride)
                count = max(0, last - first + 1)
                begin = first * stride + shift
                stop = begin + (count - 1) * stride + 1
                own.append((slice(first, first + count), slice(begin, stop, stride)) if count else _NOTHING)
            sides.append(own)
        for i, (rows, out_rows) in enumerate(sides[0]):
            for j, (columns, out_columns) in enumerate(sides[1]):
                yield i * self.kernel[1] + j, (rows, columns), (out_rows, out_columns)

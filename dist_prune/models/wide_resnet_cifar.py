"""Wide residual networks for 32x32 images in timm's registry (Zagoruyko, Komodakis: Wide Residual Networks, BMVC 2016).

``wrn28_10_cifar`` is the form that the Dirichlet-switch paper prunes: pre-activation blocks, convolutions with bias,
dropout between them, and the stride on the second convolution.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.models.registry import init_he, register


class WideBlock(nn.Module):
    """A pre-activation block with a shortcut: norm, ReLU, conv1, dropout, norm, ReLU, conv2 (strided)."""

    def __init__(self, width_in: int, width: int, stride: int, drop_rate: float):
        super().__init__()
        self.drop_rate = drop_rate
        self.bn1, self.conv1 = nn.BatchNorm2d(width_in), nn.Conv2d(width_in, width, 3, 1, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, stride, 1)
        plain = stride == 1 and width_in == width
        self.shortcut = nn.Identity() if plain else nn.Conv2d(width_in, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.dropout(self.conv1(torch.relu(self.bn1(x))), self.drop_rate, self.training)
        return self.conv2(torch.relu(self.bn2(y))) + self.shortcut(x)


class WideResNet(nn.Module):
    """Stem of 16, three stages of (depth - 4) / 6 blocks at 16, 32, 64 times ``factor`` channels, norm, pool, head.

    Args:
        depth: number of layers, 6n + 4.
        factor: factor of the widths.
        num_classes: number of outputs.
        in_chans: channels of the images.
        drop_rate: share of the values between two convolutions that dropout sets to zero.
    """

    def __init__(
        self, depth: int, factor: int, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.3
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.num_features = num_classes, 64 * factor
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1)
        width_in = 16
        for stage in (1, 2, 3):
            blocks, width = [], 8 * 2**stage * factor
            for block in range((depth - 4) // 6):
                blocks.append(WideBlock(width_in, width, 2 if stage > 1 and block == 0 else 1, drop_rate))
                width_in = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(width_in)
        self.linear = nn.Linear(width_in, num_classes)
        init_he(self)

    def get_classifier(self) -> nn.Module:
        """The linear layer of the classes, under timm's name for this method."""
        return self.linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.linear(torch.relu(self.bn(x)).mean((2, 3)))


__all__ = ["WideResNet"]
register("wrn28_10_cifar", partial(WideResNet, 28, 10), "conv1", "linear", __name__)

"""DenseNet-40 (growth 12, no bottleneck, no compression) of Huang et al. 2017, table 2, in timm's registry."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.models.registry import init_he, register

GROWTH, BLOCKS = 12, 3


class PreActivation(nn.Module):
    """Norm, ReLU, convolution."""

    def __init__(self, width_in: int, width: int, kernel: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(width_in)
        self.conv = nn.Conv2d(width_in, width, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.bn(x)))


class DenseNetCifar(nn.Module):
    """A DenseNet for 32x32 images.

    Stem of 24 channels, three blocks of (depth - 4) / 3 layers that add 12 channels each, 1x1 transitions between the
    blocks that keep the width and halve the maps, norm, average pool, linear head.

    Args:
        depth: number of layers, 3n + 4.
        num_classes: number of outputs.
        in_chans: channels of the images.
    """

    def __init__(self, depth: int = 40, num_classes: int = 10, in_chans: int = 3):
        super().__init__()
        self.num_classes = num_classes
        width = 2 * GROWTH
        self.conv = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        for block in range(1, BLOCKS + 1):
            layers = nn.ModuleList()
            for _ in range((depth - 4) // BLOCKS):
                layers.append(PreActivation(width, GROWTH, 3))
                width += GROWTH
            self.add_module(f"dense{block}", layers)
            if block < BLOCKS:
                self.add_module(f"trans{block}", PreActivation(width, width, 1))
        self.num_features = width
        self.bn = nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(8)
        self.fc = nn.Linear(width, num_classes)
        init_he(self)

    def get_classifier(self) -> nn.Module:
        """The linear layer of the classes, under timm's name for this method."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for block in range(1, BLOCKS + 1):
            for layer in self.get_submodule(f"dense{block}").children():
                x = torch.cat((x, layer(x)), 1)
            if block < BLOCKS:
                x = functional.avg_pool2d(self.get_submodule(f"trans{block}")(x), 2)
        return self.fc(self.pool(torch.relu(self.bn(x))).flatten(1))


__all__ = ["DenseNetCifar"]
register("densenet40_cifar", DenseNetCifar, "conv", "fc", __name__)

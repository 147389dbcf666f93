"""The CIFAR ResNets of He et al. 2015 section 4.2, in timm's registry.

``resnet20_cifar`` .. ``resnet110_cifar``: option A, the shortcut into a wider stage takes every second pixel and pads
channels with zeros (the form of the pretrained weights; module names follow them).
``resnet8p_cifar`` .. ``resnet110p_cifar``: the projection form of the redundancy-graph paper: stages 2 and 3 open
with a 3x3 stride-2 convolution and batch norm on the shortcut.
``resnet50_stem3``: timm's ResNet-50 for 32x32 images: a 3x3 stem of stride 1 and no max pool (the network that the
Sensitivity Pruner's authors call ResNet-56).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.models.registry import init_he, register, register_variant

WIDTHS = (16, 32, 64)


class PadShortcut(nn.Module):
    """Option A: every second pixel, zero channels on both sides."""

    def __init__(self, extra: int):
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norms and a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int, projection: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        if stride == 1:
            self.downsample = nn.Identity()
        elif projection:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width))
        else:
            self.downsample = PadShortcut(width - width_in)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNetCifar(nn.Module):
    """Stem, three stages of n blocks at 16, 32, 64 channels, average pool, linear head; depth 6n + 2.

    Args:
        depth: number of layers, 6n + 2.
        projection: whether shortcuts into wider stages are 3x3 convolutions instead of option A.
        num_classes: number of outputs.
        in_chans: channels of the images.
        img_size: size of the images, of which the pool takes a quarter; the maps that remain for larger images are
            averaged.
    """

    def __init__(self, depth: int, projection: bool, num_classes: int = 10, in_chans: int = 3, img_size: int = 32):
        super().__init__()
        self.num_classes, self.num_features = num_classes, WIDTHS[-1]
        self.conv1 = nn.Conv2d(in_chans, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        width_in = WIDTHS[0]
        for stage, width in enumerate(WIDTHS, start=1):
            blocks = []
            for block in range((depth - 2) // 6):
                stride = 2 if stage > 1 and block == 0 else 1
                blocks.append(BasicBlock(width_in, width, stride, projection))
                width_in = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.pool = nn.AvgPool2d(max(img_size // 4, 1))
        self.linear = nn.Linear(WIDTHS[-1], num_classes)
        init_he(self)

    def get_classifier(self) -> nn.Module:
        """The linear layer of the classes, under timm's name for this method."""
        return self.linear

    def forward_features(self, x: Tensor) -> Tensor:
        """The last maps, (n, 64, h / 4, w / 4), of images (n, in_chans, h, w)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(self.forward_features(x)).mean((2, 3)))


def _replace_stem(model: Any) -> None:
    old = model.conv1
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    model.global_pool.pool = nn.AvgPool2d(4)


__all__ = ["ResNetCifar"]
register_variant("resnet50_stem3", "resnet50", _replace_stem, __name__)
for _depth in (8, 14, 20, 32, 44, 56, 110):
    register(f"resnet{_depth}p_cifar", partial(ResNetCifar, _depth, True), "conv1", "linear", __name__)
    if _depth >= 20:
        register(f"resnet{_depth}_cifar", partial(ResNetCifar, _depth, False), "conv1", "linear", __name__)

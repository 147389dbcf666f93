"""MobileNets for 32x32 images, as the redundancy-graph paper's second release has them, in timm's registry.

``mobilenetv1_cifar`` (Howard et al. 2017). ``mobilenetv2_cifar`` (Sandler et al. 2018): the variant in which every
block of stride 1 has a 1x1 convolution with norm and ReLU as its shortcut; the first two stages keep the resolution.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.models.registry import init_he, register

V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))  # width, stride
V2 = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def conv(width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution with padding and its batch norm, as a list."""
    layer = nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(width)]


class MobileNetV1Cifar(nn.Module):
    """Stem and 13 pairs of a depthwise and a pointwise convolution, average pool over 2x2, linear head.

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3):
        super().__init__()
        self.num_classes, width_in = num_classes, 32
        self.stem = nn.Sequential(*conv(in_chans, width_in, 3), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential()
        for width, stride in V1:
            depthwise = [*conv(width_in, width_in, 3, stride, width_in), nn.ReLU(inplace=True)]
            self.blocks.append(nn.Sequential(*depthwise, *conv(width_in, width, 1), nn.ReLU(inplace=True)))
            width_in = width
        self.pool = nn.AvgPool2d(2)
        self.num_features = width_in
        self.fc = nn.Linear(width_in, num_classes)
        init_he(self)

    def get_classifier(self) -> nn.Module:
        """The linear layer of the classes, under timm's name for this method."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


class InvertedResidual(nn.Module):
    """Expansion, depthwise, projection; at stride 1 a 1x1 convolution as shortcut."""

    def __init__(self, width_in: int, width: int, expansion: int, stride: int):
        super().__init__()
        inner = expansion * width_in
        self.expand = nn.Sequential(*conv(width_in, inner, 1), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(*conv(inner, inner, 3, stride, inner), nn.ReLU6(inplace=True))
        self.project = nn.Sequential(*conv(inner, width, 1))
        self.shortcut = nn.Sequential(*conv(width_in, width, 1), nn.ReLU(inplace=True)) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return y if self.shortcut is None else y + self.shortcut(x)


class MobileNetV2Cifar(nn.Module):
    """Stem, 17 inverted residuals, last 1x1 convolution of 1,280, average pool over 4x4, linear head.

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3):
        super().__init__()
        self.num_classes, width_in = num_classes, 32
        self.stem = nn.Sequential(*conv(in_chans, width_in, 3), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential()
        for expansion, width, count, first in V2:
            for number in range(count):
                self.blocks.append(InvertedResidual(width_in, width, expansion, first if number == 0 else 1))
                width_in = width
        self.num_features = 1280
        self.last = nn.Sequential(*conv(width_in, self.num_features, 1), nn.ReLU(inplace=True))
        self.linear = nn.Linear(self.num_features, num_classes)
        init_he(self)

    def get_classifier(self) -> nn.Module:
        """The linear layer of the classes, under timm's name for this method."""
        return self.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.flatten(functional.avg_pool2d(self.last(self.blocks(self.stem(x))), 4), 1))


__all__ = ["MobileNetV1Cifar", "MobileNetV2Cifar"]
register("mobilenetv1_cifar", MobileNetV1Cifar, "stem.0", "fc", __name__)
register("mobilenetv2_cifar", MobileNetV2Cifar, "stem.0", "linear", __name__)

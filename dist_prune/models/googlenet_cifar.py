"""GoogLeNet for 32x32 images (Szegedy et al. 2015, two 3x3 convolutions for each 5x5), in timm's registry."""

import torch
from torch import Tensor, nn

from dist_prune.models.registry import init_he, register

# 1x1; 1x1, 3x3; 1x1, 3x3, 3x3; 1x1 after a pool. A max pool follows b3 and e4.
WIDTHS = {
    "a3": (64, 96, 128, 16, 32, 32, 32), "b3": (128, 128, 192, 32, 96, 96, 64),
    "a4": (192, 96, 208, 16, 48, 48, 64), "b4": (160, 112, 224, 24, 64, 64, 64), "c4": (128, 128, 256, 24, 64, 64, 64),
    "d4": (112, 144, 288, 32, 64, 64, 64), "e4": (256, 160, 320, 32, 128, 128, 128),
    "a5": (256, 160, 320, 32, 128, 128, 128), "b5": (384, 192, 384, 48, 128, 128, 128),
}  # fmt: skip
HALVED_AFTER = ("b3", "e4")


def conv(width_in: int, width: int, kernel: int) -> nn.Sequential:
    """A convolution with padding, batch norm and ReLU."""
    layer = nn.Conv2d(width_in, width, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class Inception(nn.Module):
    """An inception block: four branches, concatenated; ``widths`` is a row of ``WIDTHS``."""

    def __init__(self, width_in: int, widths: tuple[int, ...]):
        super().__init__()
        one, reduce3, three, reduce5, five, five_again, pooled = widths
        self.b1 = conv(width_in, one, 1)
        self.b2 = nn.Sequential(conv(width_in, reduce3, 1), conv(reduce3, three, 3))
        self.b3 = nn.Sequential(conv(width_in, reduce5, 1), conv(reduce5, five, 3), conv(five, five_again, 3))
        self.b4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(width_in, pooled, 1))
        self.width = one + three + five_again + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], 1)


class GoogLeNetCifar(nn.Module):
    """Stem of 192 channels, nine inception blocks at 32, 16 and 8 pixels, pool, linear head; 64 convolutions.

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3):
        super().__init__()
        self.num_classes, width = num_classes, 192
        self.stem = conv(in_chans, width, 3)
        self.blocks = nn.ModuleDict()
        for name, widths in WIDTHS.items():
            block = self.blocks[name] = Inception(width, widths)
            width = block.width
        self.halve = nn.MaxPool2d(3, 2, 1)
        self.pool = nn.AvgPool2d(8, 1)
        self.num_features = width
        self.linear = nn.Linear(width, num_classes)
        init_he(self)

    def get_classifier(self) -> nn.Module:
        """The linear layer of the classes, under timm's name for this method."""
        return self.linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name, block in self.blocks.items():
            x = self.halve(block(x)) if name in HALVED_AFTER else block(x)
        return self.linear(self.pool(x).flatten(1))


__all__ = ["GoogLeNetCifar"]
register("googlenet_cifar", GoogLeNetCifar, "stem.0", "linear", __name__)

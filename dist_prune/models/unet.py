"""A U-Net for dense prediction on any encoder of timm, in timm's registry: Ronneberger et al. 2015.

Each step of the decoder doubles the size by a transposed convolution, concatenates the encoder's map of that size and
applies two convolutions.
"""

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.errors import PruneError
from dist_prune.models.registry import register

IMAGENET = {"input_size": (3, 224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class _Step(nn.Module):
    """One step of the decoder: ``up``, concatenation with the encoder's map, two convolutions with batch norms."""

    def __init__(self, width_in: int, skip: int, width: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(width_in, width, 2, stride=2)
        self.conv1, self.bn1 = nn.Conv2d(width + skip, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        if x.shape[-2:] != skip.shape[-2:]:  # a side that is no multiple of the stride was rounded up
            x = functional.interpolate(x, skip.shape[-2:], mode="nearest")
        x = functional.relu(self.bn1(self.conv1(torch.cat([x, skip], 1))))
        return functional.relu(self.bn2(self.conv2(x)))


class UNet(nn.Module):
    """Logits of classes for each pixel, (n, classes, H, W), of the size of the images.

    Args:
        num_classes: number of classes.
        in_chans: channels of the images.
        encoder: timm's name of the encoder, one that gives feature maps (``features_only``).
        width: channels of the largest decoder map; each smaller map has twice as many, at most 8 times.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, encoder: str = "resnet18", width: int = 32):
        super().__init__()
        if not timm.is_model(encoder) or width < 1:
            raise PruneError(f"backbone.kwargs: the encoder {encoder!r} is no network of timm, or width is below 1")
        self.encoder = timm.create_model(encoder, features_only=True, in_chans=in_chans)
        channels = self.encoder.feature_info.channels()  # type: ignore[union-attr,operator]
        widths = [width * 2 ** min(3, level) for level in range(len(channels) - 1)]
        below = channels[-1]
        self.steps = nn.ModuleList()
        for level in reversed(range(len(channels) - 1)):
            self.steps.append(_Step(below, channels[level], widths[level]))
            below = widths[level]
        self.head = nn.Conv2d(below, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.encoder(x)
        y = maps[-1]
        for step, skip in zip(self.steps, reversed(maps[:-1]), strict=True):
            y = step(y, skip)
        return functional.interpolate(self.head(y), x.shape[-2:], mode="bilinear", align_corners=False)


register("unet", UNet, "", "head", __name__, **IMAGENET)

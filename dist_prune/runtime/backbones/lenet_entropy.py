"""The networks of the interpretable-pruning paper in timm's registry: LeNets for MNIST, VGGs with a narrow head.

``lenet6_16``: convolutions 6 and 16 (ReLU, average pools), hidden layers 120, 84, 16 (tanh). ``lenet20_50_800_500`` is
ReLU throughout, ``lenet20_50_128_64`` tanh throughout, both with max pools. ``vgg8_fc_cifar`` to ``vgg19_fc_cifar``: a
batch-normed trunk, global average pool, hidden layers 128 and 64 (tanh).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dist_prune.runtime.backbones.registry import register

# convolutions per stage of 64, 128, 256, 512, 512; a maximum pool ends each stage
TRUNKS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)
HEAD = (128, 64)


class LeNet(nn.Module):
    """5x5 convolutions without padding, each with an activation and a 2x2 pool; then hidden layers and the classes.

    ``activation`` is that of the hidden layers, ``first`` that of the convolutions.
    """

    def __init__(
        self, convs: Sequence[int], hidden: Sequence[int], activation: type[nn.Module],
        first: type[nn.Module] = nn.ReLU, pool: type[nn.Module] = nn.AvgPool2d, num_classes: int = 10,
        in_chans: int = 1, img_size: int = 28,
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.num_features = num_classes, hidden[-1]
        self.depth = (len(convs), len(hidden))
        side = img_size
        for number, width in enumerate(convs, start=1):
            self.add_module(f"conv{number}", nn.Conv2d(in_chans, width, 5))
            self.add_module(f"pool{number}", pool(2))
            in_chans, side = width, (side - 4) // 2
        features = in_chans * side**2
        for number, width in enumerate(hidden, start=1):
            self.add_module(f"fc{number}", nn.Linear(features, width))
            features = width
        self.first, self.activation = first(), activation()
        self.head = nn.Linear(features, num_classes)

    def get_classifier(self) -> nn.Module:
        """The head, as timm asks for it."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        convs, hidden = self.depth
        for number in range(1, convs + 1):
            x = self.get_submodule(f"pool{number}")(self.first(self.get_submodule(f"conv{number}")(x)))
        x = x.flatten(1)
        for number in range(1, hidden + 1):
            x = self.activation(self.get_submodule(f"fc{number}")(x))
        return self.head(x)


class VGGHead(nn.Module):
    """A VGG trunk with batch norms for 32x32 images, global average pool, two tanh layers."""

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3):
        super().__init__()
        self.num_classes, self.num_features = num_classes, HEAD[-1]
        layers: list[nn.Module] = []
        for width, count in zip(WIDTHS, TRUNKS[depth], strict=True):
            for _ in range(count):
                layers += [nn.Conv2d(in_chans, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                in_chans = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Linear(in_chans, HEAD[0])
        self.fc2 = nn.Linear(HEAD[0], HEAD[1])
        self.head = nn.Linear(HEAD[1], num_classes)

    def get_classifier(self) -> nn.Module:
        """The head, as timm asks for it."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(x)).flatten(1)
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


__all__ = ["LeNet", "VGGHead"]
_MNIST = {"input_size": (1, 28, 28), "mean": (0.0,), "std": (1.0,)}
for _name, _convs, _hidden, _activation, _first, _pool in (
    ("lenet6_16", (6, 16), (120, 84, 16), nn.Tanh, nn.ReLU, nn.AvgPool2d),
    ("lenet20_50_800_500", (20, 50), (800, 500), nn.ReLU, nn.ReLU, nn.MaxPool2d),
    ("lenet20_50_128_64", (20, 50), (128, 64), nn.Tanh, nn.Tanh, nn.MaxPool2d),
):
    register(_name, partial(LeNet, _convs, _hidden, _activation, _first, _pool), "conv1", "head", __name__, **_MNIST)
for _depth in TRUNKS:
    register(f"vgg{_depth}_fc_cifar", partial(VGGHead, _depth), "features.0", "head", __name__)

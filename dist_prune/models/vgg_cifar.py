"""VGG-16 with batch norms for 32x32 images, and timm's VGGs with torchvision's pool, in timm's registry.

``vgg16_bn_cifar``: the network of the redundancy-graph paper: convolutions with bias, four max pools, an average pool
over the last 2x2 maps, a hidden linear layer of 512 with batch norm. Its first release shrinks that layer with the last
convolution, its second one leaves it 512 wide: the same dense network, two cuts (method graph, ``narrow_classifier``).
``vgg16_bn_maxpool_cifar``: the network of the paper of mutual information between layers (mint): the same with a fifth
max pool in place of the average pool.
``vgg16_bn_linear_cifar``: the network of the Dirichlet-switch paper: a fifth max pool in place of the average
pool, a hidden linear layer without norm and activation.
``vgg16_bn_head_cifar``, ``vgg16_bn_hidden4096_cifar``: the networks of the Sensitivity Pruner: five max pools, then
one linear layer, or two hidden ones of 4096 with ReLU and dropout in front of it.
``vgg16_bn_pool7``, ``vgg19_bn_pool7``: timm's networks with maps averaged to 7x7 before the classifier, as torchvision
does; the same at 224, and the paper's network at 448, where timm would slide its 7x7 classifier over 14x14 maps.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from dist_prune.models.registry import init_he, register, register_variant

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # width, convolutions; a max pool between two stages


class VGGCifar(nn.Module):
    """13 convolutions (conv, norm, ReLU), average pool, linear, norm, ReLU, linear.

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        plain: whether the last pool is a max pool and there are no norm and activation between the linear layers.
        largest: whether the last pool is a max pool.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, plain: bool = False, largest: bool = False):
        super().__init__()
        self.num_classes = num_classes
        layers: list[nn.Module] = []
        for number, (width, count) in enumerate(STAGES):
            layers += [nn.MaxPool2d(2)] if number else []
            for _ in range(count):
                layers += [nn.Conv2d(in_chans, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                in_chans = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.MaxPool2d(2) if plain or largest else nn.AvgPool2d(2)
        hidden = self.num_features = STAGES[-1][0]
        between = () if plain else (nn.BatchNorm1d(hidden), nn.ReLU(inplace=True))
        self.hidden = nn.Sequential(nn.Linear(hidden, hidden), *between)
        self.head = nn.Linear(hidden, num_classes)
        init_he(self)

    def get_classifier(self) -> nn.Module:
        """The linear layer of the classes, under timm's name for this method."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.pool(self.features(x)).flatten(1)))


class VGGPooled(nn.Module):
    """13 convolutions (conv, norm, ReLU) with five max pools, linear layers of ``hidden`` widths, head.

    Args:
        hidden: widths of the hidden linear layers, each with ReLU and dropout.
        num_classes: number of outputs.
        in_chans: channels of the images.
    """

    def __init__(self, hidden: tuple[int, ...] = (), num_classes: int = 10, in_chans: int = 3):
        super().__init__()
        self.num_classes = num_classes
        layers: list[nn.Module] = []
        for width, count in STAGES:
            for _ in range(count):
                layers += [nn.Conv2d(in_chans, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                in_chans = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Sequential()
        for width in hidden:
            self.hidden.extend([nn.Linear(in_chans, width), nn.ReLU(inplace=True), nn.Dropout(0.5)])
            in_chans = width
        self.num_features = in_chans
        self.head = nn.Linear(in_chans, num_classes)
        init_he(self)

    def get_classifier(self) -> nn.Module:
        """The linear layer of the classes, under timm's name for this method."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.features(x).flatten(1)))


def _append_pool(model: Any) -> None:
    model.features.append(nn.AdaptiveAvgPool2d(7))


__all__ = ["VGGCifar", "VGGPooled"]
register("vgg16_bn_cifar", VGGCifar, "features.0", "head", __name__)
register("vgg16_bn_maxpool_cifar", partial(VGGCifar, largest=True), "features.0", "head", __name__)
register("vgg16_bn_linear_cifar", partial(VGGCifar, plain=True), "features.0", "head", __name__)
register("vgg16_bn_head_cifar", VGGPooled, "features.0", "head", __name__)
register("vgg16_bn_hidden4096_cifar", partial(VGGPooled, (4096, 4096)), "features.0", "head", __name__)
for _depth in (16, 19):
    register_variant(f"vgg{_depth}_bn_pool7", f"vgg{_depth}_bn.tv_in1k", _append_pool, __name__)

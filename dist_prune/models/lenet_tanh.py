"""LeNets of the interpretable-pruning paper for MNIST, in timm's registry.

``lenet6_16``: convolutions 6 and 16 (ReLU, average pools), hidden layers 120, 84, 16 (tanh). ``lenet20_50_800_500`` is
ReLU throughout, ``lenet20_50_128_64`` tanh throughout, both with max pools.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from dist_prune.models.registry import register


class LeNetTanh(nn.Module):
    """5x5 convolutions without padding, each with an activation and a 2x2 pool; then hidden layers and the classes.

    Args:
        convs: widths of the convolutions.
        hidden: widths of the hidden linear layers.
        activation: class of the activations of the hidden layers.
        first: class of the activations of the convolutions.
        pool: class of the pools.
        num_classes: number of outputs.
        in_chans: channels of the images.
        img_size: height and width of the images.
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
        """The linear layer of the classes, under timm's name for this method."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        convs, hidden = self.depth
        for number in range(1, convs + 1):
            x = self.get_submodule(f"pool{number}")(self.first(self.get_submodule(f"conv{number}")(x)))
        x = x.flatten(1)
        for number in range(1, hidden + 1):
            x = self.activation(self.get_submodule(f"fc{number}")(x))
        return self.head(x)


__all__ = ["LeNetTanh"]
_MNIST = {"input_size": (1, 28, 28), "mean": (0.0,), "std": (1.0,)}
for _name, _convs, _hidden, _activation, _first, _pool in (
    ("lenet6_16", (6, 16), (120, 84, 16), nn.Tanh, nn.ReLU, nn.AvgPool2d),
    ("lenet20_50_800_500", (20, 50), (800, 500), nn.ReLU, nn.ReLU, nn.MaxPool2d),
    ("lenet20_50_128_64", (20, 50), (128, 64), nn.Tanh, nn.Tanh, nn.MaxPool2d),
):
    register(
        _name, partial(LeNetTanh, _convs, _hidden, _activation, _first, _pool), "conv1", "head", __name__, **_MNIST
    )

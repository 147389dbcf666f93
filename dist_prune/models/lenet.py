"""LeNet-5 as the Dirichlet-switch and Shapley papers prune it, in timm's registry: 10-20-100-25, 28x28 images.

Two 5x5 convolutions, each followed by a max pool, a ReLU and a batch norm, in that order; three linear layers with
nothing between them.
"""

from torch import Tensor, nn
from torch.nn import functional

from dist_prune.models.registry import register

WIDTHS = (10, 20, 100, 25)


class LeNet(nn.Module):
    """Convolutions ``conv1``, ``conv2``, linear layers ``fc1``, ``fc2`` and the head ``fc3``.

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        img_size: height and width of the images.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1, img_size: int = 28):
        super().__init__()
        first, second, third, fourth = WIDTHS
        side = ((img_size - 4) // 2 - 4) // 2
        self.num_classes, self.num_features = num_classes, fourth
        self.conv1, self.bn1 = nn.Conv2d(in_chans, first, 5), nn.BatchNorm2d(first)
        self.conv2, self.bn2 = nn.Conv2d(first, second, 5), nn.BatchNorm2d(second)
        self.fc1, self.fc2 = nn.Linear(second * side**2, third), nn.Linear(third, fourth)
        self.fc3 = nn.Linear(fourth, num_classes)

    def get_classifier(self) -> nn.Module:
        """The linear layer of the classes, under timm's name for this method."""
        return self.fc3

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(functional.relu(functional.max_pool2d(self.conv1(x), 2)))
        x = self.bn2(functional.relu(functional.max_pool2d(self.conv2(x), 2)))
        return self.fc3(self.fc2(self.fc1(x.flatten(1))))


__all__ = ["LeNet"]
register("lenet5_mnist", LeNet, "conv1", "fc3", __name__, input_size=(1, 28, 28), mean=(0.0,), std=(1.0,))

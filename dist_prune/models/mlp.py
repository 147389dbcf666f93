"""The perceptron of the MINT paper's MNIST experiments, in timm's registry: 784-500-300-10."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.models.registry import register

HIDDEN = (500, 300)


class Mlp(nn.Module):
    """Three linear layers on the flattened image, with ReLU and dropout after the first two.

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        img_size: height and width of the images.
        drop_rate: share of the hidden units that dropout sets to zero.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1, img_size: int = 28, drop_rate: float = 0.2):
        super().__init__()
        self.num_classes = num_classes
        self.num_features = HIDDEN[-1]
        self.drop_rate = drop_rate
        self.fc1 = nn.Linear(in_chans * img_size**2, HIDDEN[0])
        self.fc2 = nn.Linear(HIDDEN[0], HIDDEN[1])
        self.fc3 = nn.Linear(HIDDEN[1], num_classes)

    def get_classifier(self) -> nn.Module:
        """The linear layer of the classes, under timm's name for this method."""
        return self.fc3

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in (self.fc1, self.fc2):
            x = functional.dropout(torch.relu(layer(x)), self.drop_rate, self.training)
        return self.fc3(x)


__all__ = ["Mlp"]
register("mlp_mnist", Mlp, "fc1", "fc3", __name__, input_size=(1, 28, 28), mean=(0.0,), std=(1.0,))

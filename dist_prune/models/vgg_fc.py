"""VGGs with a narrow head of the interpretable-pruning paper for 32x32 images, in timm's registry.

``vgg8_fc_cifar`` to ``vgg19_fc_cifar``: a batch-normed trunk, global average pool, hidden layers 128 and 64 (tanh).
"""

from functools import partial

import torch
from torch import Tensor, nn

from dist_prune.models.registry import register

# convolutions per stage of 64, 128, 256, 512, 512; a max pool ends each stage
TRUNKS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)
HEAD = (128, 64)


class VGGFC(nn.Module):
    """A VGG trunk with batch norms for 32x32 images, global average pool, two tanh layers.

    Args:
        depth: of the VGG: 8, 11, 13, 16 or 19.
        num_classes: number of outputs.
        in_chans: channels of the images.
    """

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
        """The linear layer of the classes, under timm's name for this method."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(x)).flatten(1)
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


__all__ = ["VGGFC"]
for _depth in TRUNKS:
    register(f"vgg{_depth}_fc_cifar", partial(VGGFC, _depth), "features.0", "head", __name__)

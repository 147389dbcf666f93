"""A plain network of three convolutions, as anyone writes it."""

from torch import Tensor, nn


class TheirNet(nn.Module):
    """Three convolutions with batch norms, an average, a linear layer."""

    default_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width: int = 16):
        super().__init__()
        layers: list[nn.Module] = []
        for out in (width, 2 * width, 2 * width):
            layers += [nn.Conv2d(in_chans, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            in_chans = out
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(in_chans, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))

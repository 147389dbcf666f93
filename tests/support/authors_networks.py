"""The papers' networks as their descriptions have them, with the layer names of the authors' programs."""

import itertools
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


def _conv(width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=bias)


class GraphVGG(nn.Module):
    """VGG-16 of the redundancy graphs: four max pools, an average pool, a normed hidden layer of 512."""

    def __init__(self):
        super().__init__()
        self.features, width_in = nn.Sequential(), 3
        for entry, width in enumerate(VGG16):
            if isinstance(width, str):
                self.features.add_module(f"pool{entry}", nn.MaxPool2d(2))
                continue
            self.features.add_module(f"conv{entry}", _conv(width_in, width, 3, bias=True))
            self.features.add_module(f"norm{entry}", nn.BatchNorm2d(width))
            self.features.add_module(f"relu{entry}", nn.ReLU())
            width_in = width
        layers = {
            "linear1": nn.Linear(512, 512), "norm": nn.BatchNorm1d(512), "relu": nn.ReLU(),
            "linear2": nn.Linear(512, 10),
        }  # fmt: skip
        self.classifier = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(functional.avg_pool2d(self.features(x), 2).flatten(1))


class GraphBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(width_in, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        projection = nn.Sequential(_conv(width_in, width, 3, stride), nn.BatchNorm2d(width))
        self.downsample = projection if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (self.downsample(x) if self.downsample else x)).relu()


class GraphResNet(nn.Module):
    """ResNet of depth 6n + 2 of the redundancy graphs; its stem is ``conv``, its head ``fc``."""

    def __init__(self, n: int = 3):
        super().__init__()
        self.conv, self.bn, width_in = _conv(3, 16, 3), nn.BatchNorm2d(16), 16
        for stage, width in enumerate((16, 32, 64), start=1):
            blocks = []
            for block in range(n):
                blocks.append(GraphBlock(width_in, width, 2 if stage > 1 and block == 0 else 1))
                width_in = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))

    def scored(self) -> list[str]:
        """The layers of a file of pruning information, in its order: all convolutions but the blocks' second ones."""
        return [n for n, m in self.named_modules() if isinstance(m, nn.Conv2d) and "conv2" not in n]


def _unit(width_in: int, width: int, kernel: int) -> list[nn.Module]:
    return [_conv(width_in, width, kernel), nn.BatchNorm2d(width), nn.ReLU()]


class GraphInception(nn.Module):
    def __init__(self, width_in: int, w: tuple[int, ...]):
        super().__init__()
        self.b1 = nn.Sequential(*_unit(width_in, w[0], 1))
        self.b2 = nn.Sequential(*_unit(width_in, w[1], 1), *_unit(w[1], w[2], 3))
        self.b3 = nn.Sequential(*_unit(width_in, w[3], 1), *_unit(w[3], w[4], 3), *_unit(w[4], w[5], 3))
        self.b4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), *_unit(width_in, w[6], 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in (self.b1, self.b2, self.b3, self.b4)], 1)


class GraphGoogLeNet(nn.Module):
    WIDTHS = {
        "a3": (64, 96, 128, 16, 32, 32, 32), "b3": (128, 128, 192, 32, 96, 96, 64),
        "a4": (192, 96, 208, 16, 48, 48, 64), "b4": (160, 112, 224, 24, 64, 64, 64),
        "c4": (128, 128, 256, 24, 64, 64, 64), "d4": (112, 144, 288, 32, 64, 64, 64),
        "e4": (256, 160, 320, 32, 128, 128, 128), "a5": (256, 160, 320, 32, 128, 128, 128),
        "b5": (384, 192, 384, 48, 128, 128, 128),
    }  # fmt: skip

    def __init__(self):
        super().__init__()
        self.pre_layers, width = nn.Sequential(*_unit(3, 192, 3)), 192
        for name, w in self.WIDTHS.items():
            self.add_module(f"inception_{name}", GraphInception(width, w))
            width = w[0] + w[2] + w[5] + w[6]
        self.linear = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_layers(x)
        for name in self.WIDTHS:
            x = self.get_submodule(f"inception_{name}")(x)
            x = functional.max_pool2d(x, 3, 2, 1) if name in ("b3", "e4") else x
        return self.linear(x.mean((2, 3)))


class GraphMobileNetV1(nn.Module):
    def __init__(self):
        super().__init__()
        rows = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
        self.model, width_in = nn.Sequential(nn.Sequential(*_unit(3, 32, 3))), 32
        for width, stride in rows:
            depthwise = [_conv(width_in, width_in, 3, stride, width_in), nn.BatchNorm2d(width_in), nn.ReLU()]
            self.model.append(nn.Sequential(*depthwise, *_unit(width_in, width, 1)))
            width_in = width
        self.fc = nn.Linear(width_in, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(functional.avg_pool2d(self.model(x), 2).flatten(1))


class GraphInverted(nn.Module):
    def __init__(self, width_in: int, width: int, inner: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(width_in, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _conv(inner, inner, 3, stride, inner), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = _conv(inner, width, 1), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential(*(_unit(width_in, width, 1) if stride == 1 else []))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu6(self.bn2(self.conv2(functional.relu6(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(y))
        return y + self.shortcut(x) if len(self.shortcut) else y


class GraphMobileNetV2(nn.Module):
    def __init__(self):
        super().__init__()
        rows = (
            (1, 16, 1, 1),
            (6, 24, 2, 1),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        self.conv1, self.bn1, width_in = _conv(3, 32, 3), nn.BatchNorm2d(32), 32
        self.layers = nn.Sequential()
        for times, width, count, stride in rows:
            for number in range(count):
                self.layers.append(GraphInverted(width_in, width, times * width_in, 1 if number else stride))
                width_in = width
        self.conv2, self.bn2 = _conv(320, 1280, 1), nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv2(self.layers(self.bn1(self.conv1(x)).relu()))).relu()
        return self.linear(x.mean((2, 3)))


class DirichletLeNet(nn.Module):
    """10-20-100-25: pool, ReLU, norm after each convolution; nothing between the linear layers."""

    def __init__(self):
        super().__init__()
        self.c1, self.bn1 = nn.Conv2d(1, 10, 5), nn.BatchNorm2d(10)
        self.c3, self.bn2 = nn.Conv2d(10, 20, 5), nn.BatchNorm2d(20)
        self.c5, self.f6, self.out7 = nn.Linear(320, 100), nn.Linear(100, 25), nn.Linear(25, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(functional.max_pool2d(self.c1(x), 2).relu())
        x = self.bn2(functional.max_pool2d(self.c3(x), 2).relu())
        return self.out7(self.f6(self.c5(x.flatten(1))))


class NumberedVGG(nn.Module):
    """VGG-16 with five max pools whose layers are numbered through: Dirichlet's (``c1``) and MINT's (``conv1``)."""

    def __init__(self, conv: str, hidden: str, head: str, norm: str = ""):
        super().__init__()
        self.conv, self.hidden, self.head, self.norm, number, width_in = conv, hidden, head, norm, 0, 3
        for width in VGG16:
            if isinstance(width, int):
                number += 1
                self.add_module(f"{conv}{number}", _conv(width_in, width, 3, bias=True))
                self.add_module(f"bn{number}", nn.BatchNorm2d(width))
                width_in = width
        self.add_module(hidden, nn.Linear(512, 512))
        if norm:
            self.add_module(norm, nn.BatchNorm1d(512))
        else:  # the Dirichlet authors' network holds a parameter that it does not compute with
            self.parameter = nn.Parameter(torch.full((64,), -1.0))
        self.add_module(head, nn.Linear(512, 10))

    def forward(self, x: Tensor) -> Tensor:
        number = 0
        for width in (*VGG16, "M"):
            if isinstance(width, str):
                x = functional.max_pool2d(x, 2)
                continue
            number += 1
            x = self.get_submodule(f"bn{number}")(self.get_submodule(f"{self.conv}{number}")(x)).relu()
        x = self.get_submodule(self.hidden)(x.flatten(1))
        x = self.get_submodule(self.norm)(x).relu() if self.norm else x
        return self.get_submodule(self.head)(x)


class NumberedResNet56(nn.Module):
    """MINT's ResNet-56: convolutions 1 to 55, option-A shortcuts, ``linear1``."""

    def __init__(self):
        super().__init__()
        widths = [16] * 19 + [32] * 18 + [64] * 18
        for number, width in enumerate(widths, start=1):
            width_in = 3 if number == 1 else widths[number - 2]
            self.add_module(f"conv{number}", _conv(width_in, width, 3, 2 if number in (20, 38) else 1))
            self.add_module(f"bn{number}", nn.BatchNorm2d(width))
        self.linear1 = nn.Linear(64, 10)

    def _step(self, number: int, x: Tensor) -> Tensor:
        return self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self._step(1, x).relu()
        for number in range(2, 56, 2):
            y = self._step(number + 1, self._step(number, x).relu())
            extra = (y.shape[1] - x.shape[1]) // 2
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra)) if extra else x
            x = (y + x).relu()
        return self.linear1(x.mean((2, 3)))


class EntropyLeNet(nn.Module):
    """Convolutions with pools, then linear layers ``fc1`` .. of which the last gives the classes.

    Args:
        convs: widths of the convolutions.
        linear: widths of the linear layers, the classes last.
        tanh: whether convolutions have tanh as well as the linear layers; False: ReLU.
        average: whether pools average.
        hidden: activation of the hidden layers.
    """

    def __init__(self, convs: tuple[int, int], linear: tuple[int, ...], tanh: bool, average: bool, hidden: str):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, convs[0], 5), nn.Conv2d(convs[0], convs[1], 5)
        self.tanh, self.average, self.act, self.depth = tanh, average, getattr(torch, hidden), len(linear)
        for number, (a, b) in enumerate(zip((convs[1] * 16, *linear), linear, strict=False), start=1):
            self.add_module(f"fc{number}", nn.Linear(a, b))

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2):
            x = conv(x).tanh() if self.tanh else conv(x).relu()
            x = functional.avg_pool2d(x, 2) if self.average else functional.max_pool2d(x, 2)
        x = x.flatten(1)
        for number in range(1, self.depth):
            x = self.act(self.get_submodule(f"fc{number}")(x))
        return self.get_submodule(f"fc{self.depth}")(x)


class EntropyVGG8(nn.Module):
    """VGG-8 trunk, global average, tanh layers of 128 and 64, ``fc3``."""

    def __init__(self):
        super().__init__()
        widths, layers = (3, 64, 128, 256, 512, 512), []
        for a, b in itertools.pairwise(widths):
            layers += [_conv(a, b, 3, bias=True), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.fc1, self.fc2, self.fc3 = nn.Linear(512, 128), nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(self.features(x).mean((2, 3))).tanh()).tanh())

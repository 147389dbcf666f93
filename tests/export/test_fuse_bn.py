"""Batch norms folded into convolutions: the same answers, and only where nothing else reads what is folded."""

import pytest
import torch
from torch import nn

from dist_prune import models
from dist_prune.errors import PruneError
from dist_prune.export.fuse_bn import fuse_bn
from tests.support import tiny


def norms(model: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())


class Net(nn.Module):
    """conv, then a norm; ``how`` says what else becomes of the convolution's output."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.conv, self.norm, self.other = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        for norm in (self.norm, self.other):
            norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, images):
        x = self.conv(images)
        out = self.norm(x)
        if self.how == "added":
            out = out + x
        elif self.how == "two norms":
            out = out + self.other(x)
        elif self.how == "twice":
            out = out + self.norm(self.conv(images.flip(3)))
        elif self.how == "relu between":
            out = self.other(out.relu())
        elif self.how == "shape":
            out = out * x.shape[1]
        return out.mean((2, 3))


@pytest.mark.parametrize(
    ("how", "count"),
    [("alone", 1), ("shape", 1), ("relu between", 1), ("added", 0), ("two norms", 0), ("twice", 0)],
)
def test_a_norm_is_folded_where_it_alone_reads_the_convolution(how, count):
    torch.manual_seed(0)
    model, images = Net(how).eval(), torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        wanted = model(images)
        assert fuse_bn(model, images) == count
        torch.testing.assert_close(model(images), wanted, rtol=1e-4, atol=1e-5)
    assert norms(model) == 2 - count


@pytest.mark.parametrize("name", ["resnet8p_cifar", "mobilenetv2_035", "regnetx_002"])
def test_whole_backbones_lose_every_norm_and_answer_alike(name):
    """In float64 to rounding; timm's norms that activate keep their activation."""
    model = tiny.network(name=name) if name.endswith("cifar") else _timm(name)
    images = torch.randn(2, 1, 8 if name.endswith("cifar") else 32, 8 if name.endswith("cifar") else 32).double()
    with torch.no_grad():
        wanted = model(images)
        before = norms(model)
        assert fuse_bn(model, images) == before > 0
        assert norms(model) == 0
        torch.testing.assert_close(model(images), wanted, rtol=1e-9, atol=1e-9)


def _timm(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = models.create(name, 10, 1, kwargs={}).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return model.eval()


def test_what_cannot_be_folded_is_said():
    with pytest.raises(PruneError, match="evaluation mode only"):
        fuse_bn(Net("alone").train(), torch.randn(2, 1, 8, 8))

    class Fickle(Net):
        """Reads its convolution's weights beside calling it."""

        def forward(self, images):
            return super().forward(images) * self.conv.weight.sum()

    torch.manual_seed(0)
    with pytest.raises(PruneError, match="answers otherwise"):
        fuse_bn(Fickle("alone").eval(), torch.randn(2, 1, 8, 8))

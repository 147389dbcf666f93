"""Shapes without arithmetic: those of the network, also where it looks at values or keeps what it has computed."""

import itertools
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from dist_prune.pruning.graph.layer_trace import trace_layers
from dist_prune.pruning.network_output import shaped_output
from dist_prune.pruning.shape_mode import NeedsValuesError, ShapeMode

SPATIAL = list(itertools.product((1, 2), (0, 1), (1, 2), (1, 2)))  # stride, padding, dilation, groups
NAN = float("nan")


@pytest.mark.parametrize("transposed", [False, True], ids=["convolution", "transposed"])
@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
def test_a_convolution_has_the_shape_and_the_layout_of_the_computed_one(transposed, last):
    for stride, padding, dilation, groups in SPATIAL:
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        more = {"output_padding": (stride - 1, 0)} if transposed else {}
        module = kind(4, 6, (3, 2), stride, padding, dilation=dilation, groups=groups, **more)
        images = torch.full((2, 4, 9, 8), NAN)
        if last:
            module, images = (each.to(memory_format=torch.channels_last) for each in (module, images))
        with torch.no_grad():
            real = module(images)
            with ShapeMode():
                quick = module(images)
        assert quick.shape == real.shape and quick.stride() == real.stride() and quick.isnan().all()


@pytest.mark.parametrize(
    ("module", "images"),
    [
        (nn.Conv2d(3, 4, 3), torch.full((1, 2, 8, 8), NAN)),
        (nn.Conv2d(3, 4, 3), torch.full((1, 3, 2, 2), NAN)),
        (nn.Conv2d(3, 4, 3), torch.full((1, 3, 8, 8), NAN, dtype=torch.float64)),
        (nn.ConvTranspose2d(3, 4, 3), torch.full((1, 2, 8, 8), NAN)),
        (nn.Linear(3, 4), torch.full((1, 2), NAN)),
        (nn.BatchNorm2d(3), torch.full((1, 2, 8, 8), NAN)),
    ],
    ids=["channels", "too small", "type", "transposed", "linear", "norm"],
)
def test_what_does_not_fit_raises_torch_s_own_error(module, images):
    with pytest.raises(RuntimeError) as wanted:
        module(images)
    with pytest.raises(RuntimeError) as found, ShapeMode():
        module(images)
    assert str(found.value) == str(wanted.value)


class Kept(nn.Module):
    """Has a table of positions that it computes once, by a product, and keeps for all networks of its kind."""

    tables: dict[int, torch.Tensor] = {}

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, images):
        side = images.shape[-1]
        if side not in self.tables:
            self.tables[side] = torch.arange(side * 4.0).view(side, 4) @ torch.ones(4, side)
        return self.conv(images) + self.tables[side]


def test_what_a_network_keeps_has_its_values():
    Kept.tables.clear()
    model = Kept().eval()
    assert shaped_output(model, torch.zeros(1, 3, 6, 6)).isnan().all()
    assert torch.equal(Kept.tables[6][:, 0], torch.arange(24.0).view(6, 4).sum(1))
    assert not model(torch.zeros(1, 3, 6, 6)).isnan().any()


class Looks(nn.Module):
    """As many rows as there are values above zero."""

    def __init__(self, by):
        super().__init__()
        self.linear, self.by = nn.Linear(3, 3, bias=False), by
        nn.init.eye_(self.linear.weight)

    def forward(self, images):
        found = self.linear(images)
        return found[self.by(found)]


LOOKS = {
    "mask": lambda x: x[:, 0] > 0,
    "nonzero": lambda x: (x[:, 0] > 0).nonzero()[:, 0],
    "item": lambda x: slice(0, int((x[:, 0] > 0).sum())),
    "where": lambda x: torch.where(x[:, 0] > 0),
}


@pytest.mark.parametrize("by", LOOKS)
def test_a_network_that_looks_at_values_gets_them(by):
    model, images = Looks(LOOKS[by]), torch.tensor([[1.0, 0, 0], [-1, 0, 0], [2, 0, 0]])
    with pytest.raises(NeedsValuesError, match="needs the values"), ShapeMode():
        model(images * NAN)
    assert torch.equal(shaped_output(model, images), model(images))
    order = torch.tensor([2, 0])
    assert shaped_output(Looks(lambda _: order), images).shape == (2, 3)
    with ShapeMode():
        chosen = Looks(lambda _: order)(images * NAN)  # whole numbers are no look at values
    assert chosen.isnan().all()


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224"])
def test_the_costly_operations_of_timm_s_networks_are_not_computed(name):
    """Their outputs are NaN, of the right shapes; layers are described as by a pass with values."""
    model = timm.create_model(name, num_classes=5).eval()
    images = torch.zeros(2, 3, 224, 224)
    for training in (False, True):
        assert shaped_output(model, images, training).isnan().all()
        assert shaped_output(model, images, training).shape == (2, 5)
    with ShapeMode(), pytest.raises(NeedsValuesError):
        model(images).sum().item()
    assert set(trace_layers(model, images[:1])) == {
        name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
    } | {name for name, module in model.named_modules() if isinstance(module, nn.AdaptiveAvgPool2d)}


def test_shapes_do_not_import_torch_s_compiler():
    code = (
        "import sys, torch; from torch import nn; from dist_prune.pruning.network_output import shaped_output\n"
        "model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))\n"
        "assert shaped_output(model, torch.zeros(2, 3, 8, 8)).isnan().all()\n"
        "print([name for name in ('sympy', 'torch._dynamo') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

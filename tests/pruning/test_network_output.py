"""Shapes of outputs without values: the same as those of a real pass, in both modes."""

import pytest
import torch
from torch import nn

from dist_prune import models
from dist_prune.pruning import network_output
from dist_prune.pruning.network_output import copy_with, shaped_output, tensors_of

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Looks(nn.Module):
    """Its output is as long as the image has positive values, and it keeps a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.table = torch.ones(4, 1, 1)

    def forward(self, images):
        maps = self.conv(images) + self.table
        return maps.flatten(1)[:, : int((images[0] > 0).sum())]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050", "torchvision:googlenet"])
def test_shapes_are_those_of_a_real_pass(name, training):
    kwargs = {"img_size": 32} if name.startswith("vit") else {}
    images = IMAGES if ":" not in name else torch.nn.functional.interpolate(IMAGES, 96)
    model = models.create(name, 7, 3, False, kwargs)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = list(tensors_of(shaped_output(model, images, training)))
    assert all(tensor.isnan().all() for tensor in found), "computed"
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    with torch.no_grad():
        real = list(tensors_of(model.train(training)(images)))
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in real]


def test_a_network_that_looks_at_values_is_run_with_them():
    model, state = Looks(), torch.get_rng_state()
    output = shaped_output(model, IMAGES)
    assert not output.is_meta and output.shape[1] == int((IMAGES[0] > 0).sum())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("images", "training"), [(IMAGES[:, :, :1, :1], False), (IMAGES[:1, :, :1, :1], True), (IMAGES[:, :2], False)]
)
def test_errors_are_those_of_a_real_pass(images, training):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2)).train(training)
    wanted = None
    try:
        wanted = model(images).shape
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error)) as caught:
            shaped_output(model, images, training)
        assert str(caught.value) == str(error)
    if wanted is not None:
        assert shaped_output(model, images, training).shape == wanted


def test_a_copy_with_the_same_tensors_shares_them_and_their_ties():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    other = copy_with(model, lambda tensor: tensor)
    assert other[2].weight is other[0].weight is not model[0].weight
    assert other[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert other[1].running_mean.data_ptr() == model[1].running_mean.data_ptr()
    assert other[0].weight.requires_grad and not other[0].bias.requires_grad
    other[0].register_forward_hook(lambda *_: None)
    assert not model[0]._forward_hooks and not other[1]._forward_hooks, "tables of hooks are not shared"


def test_a_pass_for_shapes_changes_nothing():
    """Neither mode, nor statistics, nor torch's generator; and no more does one that fails."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 5)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    image, state = torch.rand(1, 3, 8, 8), torch.get_rng_state()
    assert shaped_output(model, image).shape == (1, 5)
    assert shaped_output(model, torch.cat([image, image]), training=True).shape == (2, 5)
    with pytest.raises(RuntimeError):
        shaped_output(model, torch.zeros(1, 2, 8, 8), training=True)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Counted(nn.Module):
    """Keeps what it has seen as an attribute, in a buffer, and as a buffer of another size."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))
        self.images = 0

    def forward(self, images):
        self.images += len(images)
        self.mean.add_(images.mean())
        self.last = images.flatten()
        self.extra = images
        return images


def test_a_network_is_as_before_after_a_pass_with_its_values():
    model = nn.Sequential(Counted(), nn.BatchNorm2d(3))
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with network_output.unchanged(model):
        model.train()(torch.rand(2, 3, 4, 4))
        assert model[0].images == 2 and model[0].last.numel() == 96 and model[1].training
    assert model[0].images == 0 and not hasattr(model[0], "extra") and model.training and not model[1].training
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_buffers_that_cannot_be_written_are_left_alone():
    """Expanded ones share their memory, and those of inference mode take no update; a pass changes neither."""
    model = nn.Identity()
    model.register_buffer("index", torch.zeros(1).expand(4))
    with torch.inference_mode():
        model.register_buffer("mean", torch.zeros(2))
    with network_output.unchanged(model):
        model(torch.rand(1, 3, 4, 4))
    assert model.index.stride() == (0,) and not model.mean.any()

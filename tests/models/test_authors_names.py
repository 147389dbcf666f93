"""Checkpoints with the authors' names: the same weights give the same outputs under the names here."""

import re

import pytest
import torch
from torch import nn

from dist_prune import models
from dist_prune.config.data import Backbone
from dist_prune.models.authors_names import NETWORKS
from dist_prune.models.load_checkpoint import load_checkpoint
from tests.support import authors_networks as theirs

CASES = {
    "vgg16_bn_cifar": theirs.GraphVGG,
    "resnet20p_cifar": theirs.GraphResNet,
    "googlenet_cifar": theirs.GraphGoogLeNet,
    "mobilenetv1_cifar": theirs.GraphMobileNetV1,
    "mobilenetv2_cifar": theirs.GraphMobileNetV2,
    "lenet5_mnist": theirs.DirichletLeNet,
    "vgg16_bn_linear_cifar": lambda: theirs.NumberedVGG("c", "l1", "l3"),
    "vgg16_bn_maxpool_cifar": lambda: theirs.NumberedVGG("conv", "linear1", "linear3", "bn14"),
    "resnet56_cifar": theirs.NumberedResNet56,
    "lenet6_16": lambda: theirs.EntropyLeNet((6, 16), (120, 84, 16, 10), False, True, "tanh"),
    "lenet20_50_800_500": lambda: theirs.EntropyLeNet((20, 50), (800, 500, 10), False, False, "relu"),
    "lenet20_50_128_64": lambda: theirs.EntropyLeNet((20, 50), (128, 64, 10), True, False, "tanh"),
    "vgg8_fc_cifar": theirs.EntropyVGG8,
}


def _trained(model: nn.Module) -> nn.Module:
    """Batch norms as after a training, so that no two of them are alike."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            for buffer, least in ((module.running_mean, -0.2), (module.running_var, 0.5)):
                assert buffer is not None
                nn.init.uniform_(buffer, least, least + 0.5)
    return model.eval()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
@torch.inference_mode()
def test_the_same_weights_give_the_same_outputs(name, wrapped, tmp_path):
    """Also from under an entry and DataParallel's prefix, beside an optimizer's state."""
    torch.manual_seed(3)
    dense = _trained(CASES[name]())
    state = dense.state_dict()
    if wrapped:
        entry = "model_state_dict" if name == "lenet5_mnist" else "state_dict"
        state = {entry: {f"module.{key}": value for key, value in state.items()}, "epoch": 3, "accuracy": 93.0}
    torch.save(state, tmp_path / "theirs.t7")
    channels, side = (1, 28) if name.startswith("lenet") else (3, 32)
    ours = models.create(name, 10, channels)
    said: list[str] = []
    load_checkpoint(ours, tmp_path / "theirs.t7", Backbone(name=name), 10, False, said.append)
    images = torch.randn(2, channels, side, side)
    torch.testing.assert_close(ours.eval()(images), dense(images), rtol=1e-4, atol=1e-4)
    assert any(f"the authors' program of {NETWORKS[name][0].program}" in line for line in said)


@torch.inference_mode()
def test_a_head_without_bias_is_one_with_zeros(tmp_path):
    torch.manual_seed(3)
    dense = _trained(models.create("resnet18", 10, 3))
    dense.fc = nn.Linear(512, 10, bias=False)
    torch.save({"state_dict": {f"model.{key}": value for key, value in dense.state_dict().items()}}, tmp_path / "a.pth")
    ours = models.create("resnet18", 10, 3).eval()
    said: list[str] = []
    load_checkpoint(ours, tmp_path / "a.pth", Backbone(name="resnet18"), 10, False, said.append)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), dense(images))
    assert any("fc has no bias there" in line for line in said)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_map_names_layers_that_are_there_and_is_one_to_one(name):
    with torch.device("meta"):
        model = models.create(name, 10, 1 if name.startswith("lenet") else 3)
    layers = {key.rpartition(".")[0] for key in model.state_dict()}
    for names in NETWORKS[name]:
        pairs = list(names.pairs())
        assert len(dict(pairs)) == len(pairs)
        assert {ours for ours, _ in pairs} <= layers
        assert len({names.theirs.get(layer, layer) for layer in layers}) == len(layers)


def test_the_numbers_of_mint_s_resnet50_are_those_of_its_description():
    """A projection is numbered after the third convolution of its block: 5, 15, 28 and 47."""
    layers = next(names for names in NETWORKS["resnet50"] if names.program == "mint").theirs
    projections = [theirs for ours, theirs in layers.items() if ours.endswith("downsample.0")]
    assert projections == ["conv5", "conv15", "conv28", "conv47"]
    assert max(int(match[1]) for t in layers.values() if (match := re.fullmatch(r"conv(\d+)", t))) == 53


def test_a_file_with_the_names_here_is_left_alone(tmp_path):
    model = models.create("lenet5_mnist", 10, 1)
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    said: list[str] = []
    load_checkpoint(
        models.create("lenet5_mnist", 10, 1),
        tmp_path / "ours.pth",
        Backbone(name="lenet5_mnist"),
        10,
        False,
        said.append,
    )
    assert said == []

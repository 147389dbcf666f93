"""Checkpoints of torchvision's segmenters: auxiliary heads, and heads of other numbers of classes."""

import pytest
import torch
import torchvision

from dist_prune import models
from dist_prune.config.data import Backbone
from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError
from dist_prune.models.load_checkpoint import classifier_names, load_checkpoint

NAMES = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")


def published(folder, name: str):
    """A file as torchvision publishes it: 21 classes, with an auxiliary head where the network can have one."""
    torch.manual_seed(1)
    auxiliary = {} if name.startswith("lraspp") else {"aux_loss": True}
    builder = torchvision.models.get_model_builder(name)
    network = builder(weights=None, weights_backbone=None, num_classes=21, **auxiliary)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2.0)
    torch.save(network.state_dict(), folder / f"{name}.pth")
    return folder / f"{name}.pth", network


def load(name: str, file, classes: int, trains: bool, **kwargs):
    model, said = models.create(f"torchvision:{name}", classes, 3, kwargs=kwargs), []
    why = load_checkpoint(model, file, Backbone(name=f"torchvision:{name}"), classes, trains, said.append)
    return model, why, said


@pytest.mark.parametrize("name", NAMES)
def test_the_same_classes_are_loaded_whole_and_an_auxiliary_head_is_left_out(name, tmp_path):
    file, network = published(tmp_path, name)
    model, why, said = load(name, file, 21, False)
    assert why == ""
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(images)["out"], network.eval()(images)["out"])
    assert any("auxiliary head" in line for line in said) == (not name.startswith("lraspp"))


@pytest.mark.parametrize("name", NAMES)
def test_a_head_of_other_classes_is_made_anew_if_training_follows(name, tmp_path):
    file, network = published(tmp_path, name)
    with pytest.raises(PruneError, match=r"the data has 11 classes, the head '.*classifier.*' of .* has 21"):
        load(name, file, 11, False)
    model, why, _ = load(name, file, 11, True)
    assert "has 21 classes" in why
    head = classifier_names(model)
    assert all("classifier" in entry for entry in head)
    for entry, tensor in model.state_dict().items():
        assert entry in head or torch.equal(tensor, network.state_dict()[entry]), entry


def test_an_auxiliary_head_of_the_network_is_loaded_or_starts_anew(tmp_path):
    file, network = published(tmp_path, "fcn_resnet50")
    model, _, said = load("fcn_resnet50", file, 21, True, aux_loss=True)
    assert torch.equal(model.aux_classifier[-1].weight, network.aux_classifier[-1].weight)
    assert not said
    weights = {entry: tensor for entry, tensor in network.state_dict().items() if "aux" not in entry}
    tensor_files.save_tensors(tmp_path / "plain.safetensors", weights)
    model, why, said = load("fcn_resnet50", tmp_path / "plain.safetensors", 21, True, aux_loss=True)
    assert why == ""
    assert any("no auxiliary head" in line for line in said)
    with pytest.raises(PruneError, match="missing in the file: aux_classifier"):
        load("fcn_resnet50", tmp_path / "plain.safetensors", 21, False, aux_loss=True)

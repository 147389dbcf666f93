"""Torch files of training programs: weights beside data sets are read, nothing in a file is run."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from dist_prune.distributed import tensor_files, torch_files
from dist_prune.errors import PruneError

WEIGHTS = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)}


class Touch:
    """Runs ``touch`` when a file with it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


class Slots:
    """An object with fields of several kinds, as data sets have."""

    def __init__(self):
        self.images, self.names, self.transform = torch.zeros(2, 3), {"a": [1, (2, 3)]}, Slots.make

    @staticmethod
    def make():
        raise AssertionError("nothing of a file is called")


def test_weights_beside_data_sets(tmp_path):
    """The entropy paper's files; their augmented images are tensors and stay readable."""
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    body = {
        "state_dict": WEIGHTS, "test_dataset": Subset(TensorDataset(images, labels), [0, 2]),
        "train_dataset": [Slots(), {"deep": Slots()}], "last_epoch_imgs": images, "last_epoch_labels": labels,
        "last_train_aug_data": [images[:2], images[2:]], "last_train_aug_label": [labels[:2], labels[2:]],
    }  # fmt: skip
    torch.save(body, tmp_path / "a.pth")
    said: list[str] = []
    found = torch_files.read(tmp_path / "a.pth", said.append)
    assert found.keys() == body.keys() - {"test_dataset", "train_dataset"}
    assert torch.equal(found["last_epoch_imgs"], images)
    assert "test_dataset, train_dataset" in said[0]
    weights = tensor_files.read_weights(tmp_path / "a.pth")
    assert {name: tensor.tolist() for name, tensor in weights.items()} == {n: t.tolist() for n, t in WEIGHTS.items()}


@pytest.mark.parametrize("entry", ["test_dataset", "state_dict", "other"])
def test_nothing_in_a_file_is_run(entry, tmp_path):
    torch.save({"state_dict": WEIGHTS, entry: Touch(tmp_path / "run")}, tmp_path / "a.pth")
    with pytest.raises(PruneError, match="would run code, so it is refused"):
        tensor_files.read_weights(tmp_path / "a.pth")
    assert not (tmp_path / "run").exists()


def test_a_network_as_an_object_is_refused_with_the_command_that_converts_it(tmp_path):
    """The command is run as it stands, and its file is read."""
    torch.save(nn.Sequential(nn.Linear(3, 2)), tmp_path / "logits_best.pkl")
    with pytest.raises(PruneError, match="convert it where its program runs") as caught:
        tensor_files.read_weights(tmp_path / "logits_best.pkl")
    code = str(caught.value).partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert tensor_files.read_weights(tmp_path / "logits_best.plain.pth").keys() == {"0.weight", "0.bias"}


def test_a_state_dict_beside_an_optimizer_is_read(tmp_path):
    """MINT's ``logits_best.pkl``: epoch, step, state_dict, optimizer."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    body = {"epoch": 30, "step": 0, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(body, tmp_path / "logits_best.pkl")
    assert tensor_files.read_weights(tmp_path / "logits_best.pkl").keys() == {"weight", "bias"}


def test_a_torchscript_program_says_how_to_save_its_weights(tmp_path):
    """The command in the message makes a file that is read."""
    network = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3)), tmp_path / "a.pt")
    with pytest.raises(PruneError, match="is a TorchScript program") as error:
        torch_files.read(tmp_path / "a.pt")
    assert "weights_only" not in str(error.value)
    code = next(line for line in str(error.value).splitlines() if "python -c" in line).split('"')[1]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    found = tensor_files.read_weights(tmp_path / "weights.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in network.state_dict().items()
    }

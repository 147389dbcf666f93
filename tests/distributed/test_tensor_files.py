"""Weights on disk: safetensors, strict, nothing that would run code."""

import pickle

import pytest
import torch

from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError
from tests.support import tiny


class Evil:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (print, ("code ran",))


def test_there_and_back(tmp_path):
    state = tiny.network().state_dict()
    tensor_files.save_tensors(tmp_path / "a.safetensors", state, {"epoch": 3, "nested": {"x": [1.5]}})
    again, meta = tensor_files.read_tensors(tmp_path / "a.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    assert meta == {"epoch": 3, "nested": {"x": [1.5]}}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 1}, lambda s: {"model": s}])
def test_foreign_wrappings_are_undone(tmp_path, wrap):
    state = tiny.network().state_dict()
    torch.save(wrap({f"module.{name}": tensor for name, tensor in state.items()}), tmp_path / "a.pth")
    assert tensor_files.read_weights(tmp_path / "a.pth").keys() == state.keys()


def test_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "a.pth")
    with pytest.raises(PruneError, match="would run code, so it is refused"):
        tensor_files.read_weights(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(PruneError, match="would run code|no torch checkpoint"):
        tensor_files.read_weights(tmp_path / "b.pth")
    assert "code ran" not in capsys.readouterr().out


def test_missing_damaged_and_empty_files(tmp_path):
    with pytest.raises(PruneError, match="there is no file"):
        tensor_files.read_weights(tmp_path / "none.safetensors")
    tensor_files.save_tensors(tmp_path / "a.safetensors", tiny.network().state_dict())
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-100])
    with pytest.raises(PruneError, match="damaged or cut short"):
        tensor_files.read_weights(tmp_path / "a.safetensors")
    (tmp_path / "b.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(PruneError, match=r"b\.pth"):
        tensor_files.read_weights(tmp_path / "b.pth")
    torch.save([1, 2], tmp_path / "c.pth")
    with pytest.raises(PruneError, match="holds no state dict"):
        tensor_files.read_weights(tmp_path / "c.pth")


def test_what_does_not_fit_is_named():
    model = tiny.network()
    weights = dict(model.state_dict())
    weights["conv1.weight"] = torch.zeros(16, 3, 3, 3)
    weights["head.bias"] = weights.pop("linear.bias")
    with pytest.raises(PruneError) as error:
        tensor_files.load_strictly(model, weights, "a.safetensors")
    text = str(error.value)
    assert "conv1.weight: (16, 3, 3, 3) in the file, (16, 1, 3, 3) in the network" in text
    assert "missing in the file: linear.bias" in text
    assert "not in the network: head.bias" in text


def test_optimizer_state_survives_the_file(tmp_path):
    model = tiny.network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(tiny.example()).sum().backward()
    optimizer.step()
    tensors, plain = tensor_files.pack_optimizer(optimizer)
    tensor_files.save_tensors(tmp_path / "a.safetensors", tensors, plain)
    other = torch.optim.SGD(model.parameters(), 0.5)
    tensor_files.unpack_optimizer(other, *tensor_files.read_tensors(tmp_path / "a.safetensors"))
    mine, theirs = optimizer.state_dict(), other.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    for index, state in mine["state"].items():
        assert torch.equal(state["momentum_buffer"], theirs["state"][index]["momentum_buffer"])


def test_import_of_foreign_checkpoints(tmp_path, capsys):
    """The papers' files: a wrapper, prefixes, numpy arrays and scalars beside the weights."""
    import numpy as np

    from dist_prune.cli.main import main

    state = tiny.network().state_dict()
    wrapped = {f"module.model.{name}": tensor for name, tensor in state.items()}
    extra = {"last_epoch_imgs": np.ones((2, 3)), "last_train_aug_data": np.zeros(4, np.uint8), "acc": np.float64(93.0)}
    torch.save({"state_dict": wrapped, "epoch": 3, **extra}, tmp_path / "a.tar")
    assert main(["import-checkpoint", str(tmp_path / "a.tar"), "--out", str(tmp_path / "a.safetensors")]) == 0
    assert f"{len(state)} tensors" in capsys.readouterr().out
    again, _ = tensor_files.read_tensors(tmp_path / "a.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    torch.save({"state_dict": wrapped, "args": Evil()}, tmp_path / "b.pth")
    assert main(["import-checkpoint", str(tmp_path / "b.pth"), "--out", str(tmp_path / "b.safetensors")]) == 2
    captured = capsys.readouterr()
    assert "print" in captured.err
    assert "code ran" not in captured.out
    assert not (tmp_path / "b.safetensors").exists()

"""Checkpoints as other programs write them: timm's own, averaged weights beside plain ones, wrappers and prefixes."""

import argparse
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timm.models import load_state_dict
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dist_prune import methods
from dist_prune.cli.main import main
from dist_prune.config import loading
from dist_prune.distributed import checkpoint_formats, tensor_files
from dist_prune.errors import PruneError
from tests.support import tiny


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture
def timms(tmp_path):
    """What timm's train.py leaves: a Namespace under args, the optimizer, averaged weights beside the others."""
    model = tiny.network()
    averaged = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    settings = argparse.Namespace(model="resnet8p", lr=0.1, opt_betas=None, output=str(tmp_path), sizes=(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    saver = CheckpointSaver(model, optimizer, settings, averaged, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(3, metric=50.0)
    return tmp_path / "last.pth.tar", model.state_dict(), averaged.module.state_dict()


def test_timms_own_checkpoint_and_its_averaged_weights(timms):
    file, plain, averaged = timms
    said: list[str] = []
    assert same(tensor_files.read_weights(file, say=said.append), averaged)
    assert len(said) == 1
    assert "has state_dict_ema, state_dict; the averaged weights of state_dict_ema are taken" in said[0]
    assert "backbone.checkpoint_key=state_dict" in said[0]
    assert same(dict(load_state_dict(str(file))), averaged), "as timm's loader does"
    assert same(tensor_files.read_weights(file, "ema"), averaged)
    assert same(tensor_files.read_weights(file, "state_dict", say=said.append), plain)
    assert len(said) == 1, "nothing is chosen for a person who chose"
    with pytest.raises(PruneError, match=r"no entry 'state_dct'.*Did you mean 'state_dict'\?.*It has state_dict, "):
        tensor_files.read_weights(file, "state_dct")


class Evil:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("bag", [argparse.Namespace, SimpleNamespace])
def test_settings_are_read_and_code_within_them_is_not(tmp_path, capsys, bag):
    state = tiny.network().state_dict()
    torch.save({"state_dict": state, "args": bag(place=Path("x"), deep=bag(a=[1, None]))}, tmp_path / "a.pth")
    assert same(tensor_files.read_weights(tmp_path / "a.pth"), state)
    torch.save({"state_dict": state, "args": bag(deep=Evil())}, tmp_path / "b.pth")
    with pytest.raises(PruneError, match="would run code, so it is refused"):
        tensor_files.read_weights(tmp_path / "b.pth")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "key", ["state_dict", "model_state_dict", "model", "net", "model_ema", "model_state", "module"]
)
def test_entries_around_the_weights(tmp_path, key):
    state = tiny.network().state_dict()
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []}
    torch.save({key: state, "optimizer": optimizer, "epoch": 2, "best": torch.tensor(1.0)}, tmp_path / "a.pth")
    assert same(tensor_files.read_weights(tmp_path / "a.pth"), state)
    torch.save({key: {"model": state}}, tmp_path / "b.pth")
    assert same(tensor_files.read_weights(tmp_path / "b.pth"), state)


def test_an_entry_of_another_name_is_named_and_asked_for(tmp_path):
    state = tiny.network().state_dict()
    torch.save(
        {"student": state, "teacher": {"module." + name: t + 1 for name, t in state.items()}}, tmp_path / "a.pth"
    )
    with pytest.raises(PruneError, match=rf"it has student \({len(state)} tensors\); teacher .*checkpoint_key="):
        tensor_files.read_weights(tmp_path / "a.pth")
    assert same(tensor_files.read_weights(tmp_path / "a.pth", "student"), state)
    assert same(tensor_files.read_weights(tmp_path / "a.pth", "teacher"), {name: t + 1 for name, t in state.items()})


STACKS = [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.model.",
    "net.",
    "model.backbone.",
    "encoder.",
]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("stack", STACKS)
def test_any_stack_of_prefixes(stack, known):
    state = tiny.network().state_dict()
    found = checkpoint_formats.match_names(
        {stack + name: t for name, t in state.items()}, state if known else None, (), "a.pth"
    )
    assert same(found, state)


def test_prefixes_that_are_the_networks_own_names_stay():
    own = {"encoder.conv.weight": torch.ones(1), "encoder.fc.weight": torch.ones(2), "model.fc.bias": torch.ones(3)}
    assert same(checkpoint_formats.match_names(own, own, (), "a.pth"), own)
    assert same(checkpoint_formats.match_names({f"module.{name}": t for name, t in own.items()}, own, (), "a.pth"), own)
    mixed = {"backbone.conv.weight": torch.ones(1), "module.fc.weight": torch.ones(2)}
    assert list(checkpoint_formats.match_names(mixed, ["conv.weight", "fc.weight"], (), "a.pth")) == [
        "conv.weight",
        "fc.weight",
    ]
    inner = {"layer1._orig_mod.0.weight": torch.ones(1)}
    assert list(checkpoint_formats.match_names(inner, ["layer1.0.weight"], (), "a.pth")) == ["layer1.0.weight"]


def test_two_names_that_become_one_are_refused():
    both = {"model.fc.weight": torch.ones(1), "fc.weight": torch.zeros(1)}
    with pytest.raises(PruneError, match=r"model\.fc\.weight and fc\.weight are both fc\.weight.*checkpoint_skip"):
        checkpoint_formats.match_names(both, ["fc.weight"], (), "a.pth")
    found = checkpoint_formats.match_names(both, ["fc.weight"], ["model.*"], "a.pth")
    assert float(found["fc.weight"]) == 0


@pytest.mark.parametrize("known", [False, True])
def test_counters_and_losses_are_left_out_and_said(known):
    model = tiny.network()
    state = model.state_dict()
    counted = dict(AveragedModel(model).state_dict())  # n_averaged, and module. before all others
    for name in ("conv1", "layer1.0"):
        counted |= {f"module.{name}.total_ops": torch.zeros(1), f"module.{name}.total_params": torch.zeros(1)}
    counted["criterion.weight"] = torch.ones(10)
    said: list[str] = []
    assert same(checkpoint_formats.match_names(counted, state if known else None, (), "a.pth", said.append), state)
    assert len(said) == 1
    assert all(words in said[0] for words in ("n_averaged", "2 total_ops", "2 total_params", "criterion.weight"))


def test_what_a_network_has_is_no_counter():
    own = {"criterion.weight": torch.ones(1), "fc.weight": torch.ones(1)}
    assert same(checkpoint_formats.match_names(own, own, (), "a.pth"), own)


def test_names_to_leave_out(tmp_path, capsys):
    state = tiny.network().state_dict()
    torch.save({**state, "proj.weight": torch.ones(1), "epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(PruneError, match="not in the network: proj.weight"):
        tensor_files.load_strictly(tiny.network(), tensor_files.read_weights(tmp_path / "a.pth"), "a.pth")
    said: list[str] = []
    assert same(tensor_files.read_weights(tmp_path / "a.pth", skip=["proj.*"], say=said.append), state)
    assert said == ["checkpoint: left out of a.pth, no tensors: epoch", "checkpoint: left out of a.pth: proj.weight"]
    with pytest.raises(PruneError, match=r"checkpoint_skip: prj\.\* fit no name in a\.pth\. Did you mean 'proj'\?"):
        tensor_files.read_weights(tmp_path / "a.pth", skip=["prj.*"])
    words = ["import-checkpoint", str(tmp_path / "a.pth"), "--out", str(tmp_path / "a.safetensors"), "--skip", "proj.*"]
    assert main(words) == 0
    assert "left out of a.pth: proj.weight" in capsys.readouterr().out
    assert same(tensor_files.read_tensors(tmp_path / "a.safetensors")[0], state)


def test_import_takes_the_weights_that_are_asked_for(timms, capsys):
    file, plain, averaged = timms
    out = file.with_name("out.safetensors")
    for more, wanted in (([], averaged), (["--key", "state_dict"], plain)):
        assert main(["import-checkpoint", str(file), "--out", str(out), *more]) == 0
        assert same(tensor_files.read_tensors(out)[0], wanted)
    assert "the averaged weights of state_dict_ema are taken" in capsys.readouterr().out


@pytest.mark.parametrize("length", [None, 0x0280])
def test_a_files_content_says_what_it_is(tmp_path, length):
    """A header of 640 bytes makes a safetensors file begin as a pickle does."""
    state = tiny.network().state_dict() if length is None else {"fc.weight": torch.ones(3)}
    data = tensor_files.encode(state)
    if length is not None:
        header = int.from_bytes(data[:8], "little")
        data = length.to_bytes(8, "little") + data[8 : 8 + header].ljust(length) + data[8 + header :]
        assert data.startswith(b"\x80\x02")
    (tmp_path / "a.bin").write_bytes(data)
    assert same(tensor_files.read_weights(tmp_path / "a.bin"), state)
    torch.save(state, tmp_path / "b.safetensors")
    assert same(tensor_files.read_weights(tmp_path / "b.safetensors"), state)
    torch.save(state, tmp_path / "c.safetensors", _use_new_zipfile_serialization=False)
    assert same(tensor_files.read_weights(tmp_path / "c.safetensors"), state)
    (tmp_path / "d.safetensors").write_text("neither of them")
    with pytest.raises(PruneError, match="damaged or cut short"):
        tensor_files.read_weights(tmp_path / "d.safetensors")


@pytest.mark.parametrize("key", ["backbone.checkpoint_key=ema", "backbone.checkpoint_skip=[fc.*]"])
def test_a_choice_within_no_file_is_refused(key):
    with pytest.raises(PruneError, match=r"chooses within a file: name one with backbone\.checkpoint"):
        loading.load("quickstart", [key], methods.options_of)


def test_a_bare_module_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(PruneError, match="holds more than tensors"):
        tensor_files.read_weights(tmp_path / "a.pth")


class Settings:
    """An object of a program."""


@pytest.mark.parametrize("entry", ["model_state_dict", "net", "model", "whole"])
def test_the_command_of_a_refusal_keeps_the_weights(entry, tmp_path, monkeypatch):
    """Under any entry, as a network or as its state dict, with an object beside it."""
    network = nn.Linear(2, 2)
    inner = network if entry in ("model", "whole") else network.state_dict()
    file = tmp_path / "ckpt.t7"
    torch.save(network if entry == "whole" else {entry: inner, "args": Settings(), "epoch": 3}, file)
    with pytest.raises(PruneError, match=r"backbone\.checkpoint: .* holds more than tensors") as refused:
        tensor_files.read_weights(file)
    command = shlex.split(str(refused.value)[str(refused.value).index("python -c ") :])
    monkeypatch.chdir(tmp_path)
    exec(command[2], {"__name__": "converting"})
    assert same(tensor_files.read_weights(tmp_path / "ckpt.plain.pth"), network.state_dict())

"""The examples run as their readers run them, and reach what they print."""

import re
import runpy
import sys

import pytest
from accelerate.state import AcceleratorState, GradientState

from tests.support.launch import ROOT, TORCHRUN, run

FOLDER = ROOT / "examples"
NEEDS = {"lightning_module.py": "lightning", "huggingface_trainer.py": "transformers"}  # of the extra "examples"
FEW, FEWER = ("--epochs", "2", "--images", "600"), ("--epochs", "1", "--images", "100")
# words, share of the MACs that is kept, and the least accuracy after finetuning on the digits
CLAIMS = {
    ("lightning_module.py",): (0.5, 95),
    ("lightning_module.py", "--callback"): (0.5, 95),
    ("huggingface_trainer.py",): (0.6, 90),
    ("huggingface_trainer.py", "--model", "vit"): (0.6, 50),
    ("torchvision_reference.py", "--epochs", "2"): (0.5, 90),
    ("torchvision_reference.py", "--model", "mobilenet_v3_small", "--epochs", "6"): (0.5, 85),
    ("timm_train.py",): (0.5, 85),
}
# the same with fewer images: what two epochs reach, or the cut and the bundle alone
QUICK = {
    ("plain_pytorch.py", *FEW): (0.5, 60),
    ("lightning_module.py", *FEWER): (0.5, 0),
    ("lightning_module.py", "--callback", *FEW): (0.5, 80),
    ("huggingface_trainer.py", *FEWER): (0.6, 0),
    ("huggingface_trainer.py", "--model", "vit", "--macs", "0.4", *FEWER): (0.4, 0),
    ("torchvision_reference.py", *FEWER): (0.5, 0),
    ("timm_train.py", *FEWER): (0.5, 0),
}


def figures(text: str) -> dict[str, float]:
    """Accuracies by the first word of their line; MACs and parameters of the dense and the pruned network."""
    found = {name: float(value) for name, value in re.findall(r"^(\w+) +([\d.]+) %", text, re.M)}
    for name, macs, params in re.findall(r"^(\w+) .* ([\d,]+) MACs +([\d,]+) parameters$", text, re.M):
        found |= {f"{name} macs": int(macs.replace(",", "")), f"{name} params": int(params.replace(",", ""))}
    return found


def check(text: str, target: float, least: float) -> None:
    """The cut meets the target, finetuning mends what it broke, and the bundle answers as the network does."""
    found = figures(text)
    assert 0.9 * target <= found["pruned macs"] / found["dense macs"] <= target, text
    assert found["pruned params"] < found["dense params"]
    assert found["loaded"] == found["finetuned"]
    assert found["finetuned"] >= least, text
    if least:
        assert found["finetuned"] >= found["pruned"]


@pytest.fixture
def start(monkeypatch, capsys, tmp_path):
    """Runs an example in this process on the digits, and returns what it printed."""
    monkeypatch.delenv("DIST_PRUNE_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))

    def start_(file: str, *words: str) -> str:
        if file in NEEDS:
            pytest.importorskip(NEEDS[file])
        monkeypatch.setattr(sys, "argv", [file, *words, "--out", str(tmp_path / "pruned")])
        runpy.run_path(str(FOLDER / file), run_name="__main__")
        assert (tmp_path / "pruned/bundle.json").is_file()
        return capsys.readouterr().out

    yield start_
    AcceleratorState._reset_state(reset_partial_state=True)  # transformers' Trainer leaves its device in the process
    GradientState._reset_state()


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_an_example_with_few_images(start, words):
    check(start(*words), *QUICK[words])


@pytest.mark.slow
@pytest.mark.parametrize("words", CLAIMS, ids=" ".join)
def test_an_example_on_the_digits(start, words):
    check(start(*words), *CLAIMS[words])


@pytest.mark.slow
def test_two_ranks_find_one_plan_on_real_images(data, tmp_path):
    words = (str(FOLDER / "plain_pytorch.py"), "--out", str(tmp_path / "pruned"))
    code, text = run((*TORCHRUN[:-1], *words), None, DIST_PRUNE_DATA=str(data), PYTHONPATH=str(ROOT))
    assert code == 0, text
    line = r"plan +([0-9a-f]{64})"  # a line and its end may be two writes, and the other rank's line between them
    plans = re.findall(line, text)
    assert len(plans) == 2
    assert len(set(plans)) == 1
    check(re.sub(line, "", text), 0.5, 35)

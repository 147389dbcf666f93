"""docs/adding-a-network.md: its code runs as it stands, from a recipe to a bundle; other forms of names run as well."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import dist_prune
from tests.support.launch import PYTHON, ROOT, SMALL, TORCHRUN, report, run

PAGE = (ROOT / "docs/adding-a-network.md").read_text()
NETWORK, LOADING = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
WORDS = tuple(word for word in SMALL if not word.startswith("backbone.name")) + ("train.epochs=1", "finetune.epochs=1")


@pytest.mark.slow
def test_the_page(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(NETWORK)
    name = f"{os.path.relpath(tmp_path, ROOT)}/my_networks.py:SmallNet"
    name = name if name.startswith(".") else f"./{name}"
    folder = tmp_path / "runs/mine"
    code, output = run(
        PYTHON, folder, *WORDS, f"backbone.name={name}", "backbone.kwargs={width: 24}", "backbone.protect=[stem.*]"
    )
    assert code == 0, output
    groups = {group["name"]: group for group in report(folder)["plan"]["groups"]}
    assert groups["conv1"]["kept"] < groups["conv1"]["width"]
    assert "backbone.protect" in groups["stem.0"]["reason"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    body = json.loads((folder / "export/bundle.json").read_text())
    assert body["backbone"]["name"] == name
    monkeypatch.chdir(ROOT)
    loading = LOADING.replace('"runs/mine"', repr(str(folder))).replace("./my_networks.py:SmallNet", name)
    found: dict = {}
    exec(loading, found)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(found["small"](images), found["again"](images))
    sys.modules.pop("my_networks", None)
    (tmp_path / "my_networks.py").write_text(NETWORK + "\n# edited\n")
    words = (*WORDS, f"backbone.name={name}", "backbone.kwargs={width: 24}", "backbone.protect=[stem.*]")
    code, output = run(PYTHON, folder, *words)
    assert code == 2 and "backbone.name (the content of its files)" in output


def saved_by_timm(folder: Path) -> str:
    import timm
    from timm.models import save_for_hf

    save_for_hf(timm.create_model("resnet10t", num_classes=10), folder, safe_serialization=True)
    return f"local-dir:{folder}"


def saved_by_transformers(folder: Path) -> str:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    sizes = {"depths": [1, 1], "hidden_sizes": [16, 32], "embedding_size": 8, "layer_type": "basic"}
    config = transformers.ResNetConfig(num_labels=10, num_channels=1, **sizes)
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    return f"transformers:{folder}"


FORMS = {
    "timm": (saved_by_timm, PYTHON), "transformers": (saved_by_transformers, TORCHRUN),
    "torchvision": (lambda folder: "torchvision:resnet18", PYTHON),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_other_forms_from_weights_to_a_bundle(form, tmp_path):
    make, launcher = FORMS[form]
    name = make(tmp_path / "net")
    pretrained = form != "torchvision"
    words = (
        *WORDS,
        f"backbone.name={name}",
        f"backbone.pretrained={str(pretrained).lower()}",
        "data.image_size=32",
        "backbone.kwargs={}",
    )
    code, output = run(launcher, tmp_path / "run", *words)
    assert code == 0, output
    facts = report(tmp_path / "run")
    assert facts["pruned"]["macs"] < 0.8 * facts["dense"]["macs"]
    (tmp_path / "net").rename(tmp_path / "elsewhere") if (tmp_path / "net").exists() else None
    network = dist_prune.load(tmp_path / "run")
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 10)

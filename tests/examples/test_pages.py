"""The pages for people from other tools: every example is listed, and every call that they name exists."""

import re
from operator import attrgetter

import pytest
import torch_pruning
from torch.nn.utils import prune

import dist_prune as dp
from dist_prune import methods
from dist_prune.config.pruning import Schedule, Select
from tests.support.launch import ROOT

PAGE = (ROOT / "docs" / "faq.md").read_text().partition("## Coming from Torch-Pruning")[2].partition("\n## ")[0]
ROWS = [line.strip("|").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]


def test_every_example_is_listed():
    text = (ROOT / "examples" / "README.md").read_text()
    files = {file.name for file in (ROOT / "examples").iterdir() if file.suffix in (".py", ".ipynb")}
    listed = set(re.findall(r"^\| `(\w+\.\w+)`", text, re.M))
    assert listed == files - {"small_images.py"}
    assert "small_images.py" in text


def test_the_calls_of_other_tools_exist():
    theirs = "\n".join(row[0] for row in ROWS)
    tp, torch_prune = (set(re.findall(rf"\b{word}\.([A-Za-z_][\w.]*)", theirs)) for word in ("tp", "prune"))
    assert len(tp) >= 14
    for name in tp:
        assert attrgetter(name)(torch_pruning)
    assert len(torch_prune) == 5
    for name in torch_prune:
        assert attrgetter(name)(prune)
    arguments = torch_pruning.pruner.BasePruner.__init__.__code__.co_varnames
    named = re.findall(
        r"`(pruning_ratio\w*|global_pruning|max_pruning_ratio|round_to|ignored_layers|iterative_steps)", theirs
    )
    assert len(named) >= 6
    assert set(named) <= set(arguments)
    assert pytest.importorskip("lightning").pytorch.callbacks.ModelPruning


def test_our_calls_exist():
    ours = "\n".join(row[1] for row in ROWS)
    for name in re.findall(r"\bdp\.([A-Za-z_][\w.]*)", ours):
        assert attrgetter(name)(dp)
    keys = set(re.findall(r"[`( ](\w+)=", ours)) - {"target", "form"}
    assert {"keep_ratio", "keep_ratios", "scope", "exclude", "include"} <= keys
    assert keys <= set(Select.model_fields)
    assert "rounds" in Schedule.model_fields
    assert methods.build({"name": "taylor", "form": "weight"})
    named = {"l1", "l2", "group_norm", "bn_scale", "fpgm", "random", "apoz", "taylor"}
    assert all(f"`{name}`" in ours or f'"{name}"' in ours for name in named)
    assert named <= set(methods.list_names())

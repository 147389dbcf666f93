"""docs/adding-a-task.md: its task and its test are the package's, its recipe runs; docs/tasks.md names all tasks."""

import re
import runpy

import numpy as np
import pytest

from dist_prune import methods, tasks
from dist_prune.cli.main import main
from dist_prune.data.datasets import open_source
from tests.support.launch import PYTHON, ROOT, report, run

PAGE = ROOT / "docs" / "adding-a-task.md"


@pytest.fixture(scope="module")
def blocks():
    return re.findall(r"^```\w+\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def test_the_task_of_the_page_is_the_package_s(blocks):
    assert blocks[0] == (ROOT / "dist_prune/tasks/regression.py").read_text()


def test_the_test_of_the_page_is_the_package_s(blocks):
    assert blocks[1] == (ROOT / "tests/tasks/test_regression.py").read_text()


def test_every_task_and_refused_method_is_on_the_page():
    text = (ROOT / "docs" / "tasks.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == set(tasks.list_names())
    refused = text.partition("## Methods")[2].partition("\n## ")[0]
    assert all(f"`{name}`" in refused for name in methods.list_names() if methods.find(name).task_needs)


@pytest.mark.slow
def test_the_library_of_the_page_runs(tmp_path, monkeypatch):
    examples = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "tasks.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    for code in examples:
        (tmp_path / "example.py").write_text(code)
        runpy.run_path(str(tmp_path / "example.py"))
    made = {path.parent.name for path in tmp_path.glob("*/bundle.json")}
    assert made == {"pruned_segmenter", "pruned_detector"}


@pytest.mark.slow
def test_the_recipe_of_the_page_runs(blocks, tmp_path):
    recipe, arrays = tmp_path / "digits_ink.yaml", {}
    recipe.write_text(blocks[2])
    for split, train in (("train", True), ("test", False)):
        images = open_source("digits", None, "", train).images[:200]
        arrays |= {f"x_{split}": images, f"y_{split}": images.reshape(len(images), -1).mean(1) / 100}
    np.savez(tmp_path / "ink.npz", **arrays)
    folder = tmp_path / "run"
    code, output = run(PYTHON, folder, recipe=str(recipe), DIGITS_INK=str(tmp_path / "ink.npz"))
    assert code == 0, output
    body = report(folder)
    assert body["task"]["primary"] == "rmse"
    assert "RMSE" in output
    assert body["finetuned"]["rmse"] < 1


def test_the_list_of_tasks_has_all_of_them(capsys):
    assert main(["list", "tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == tasks.list_names()
    assert "a mask for each image; judged by mIoU %; task.aux_weight" in "\n".join(lines)

"""What a recipe's name means: aliases without a word, and suggestions that weigh the words of a name."""

import json
from pathlib import Path

import pytest

from dist_prune import methods
from dist_prune.cli.main import main
from dist_prune.config import loading, recipe_files, sweep
from dist_prune.errors import PruneError


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("resnet50_imagenet_graph", "resnet50_graph"),
        ("resnet50_imagenet_graph.yaml", "resnet50_graph"),
        ("resnet50_graph.yaml", "resnet50_graph"),
        ("resnet50_imagenet_graph_v1", "resnet50_graph_v1"),
        ("resnet50_imagenet_mint", "resnet50_mint"),
        ("resnet50_imagenet_shapley", "resnet50_shapley"),
        ("resnet50_imagenet_dirichlet", "resnet50_dirichlet"),
        ("mobilenetv2_imagenet_sensitivity.yaml", "mobilenetv2_sensitivity"),
        ("vgg16_imagenet_sensitivity", "vgg16_sensitivity"),
        ("recipes/resnet50_imagenet_graph.yaml", "resnet50_graph"),
        ("recipes/resnet50_graph.yaml", "resnet50_graph"),
        ("recipes/resnet50_graph", "resnet50_graph"),
        ("recipes/graph/resnet50_graph.yaml", "resnet50_graph"),
        ("recipes/graph/resnet50_imagenet_graph", "resnet50_graph"),
        (str(recipe_files.recipe_folders()[1] / "resnet56_cifar10_l1.yaml"), "resnet56_cifar10_l1"),
    ],
)
def test_old_names_and_paths_mean_the_same_recipe_quietly(old, new, capsys):
    spec = loading.load(old, [], methods.options_of, need_environment=False)
    assert spec == loading.load(new, [], methods.options_of, need_environment=False)
    assert spec.name == new
    assert capsys.readouterr() == ("", "")


def test_no_recipe_s_name_has_imagenet_for_a_word():
    assert not [name for name in recipe_files.known_recipes() if recipe_files.resolve_alias(name) != name]


def test_aliases_work_in_sweeps(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("tasks:\n  - base: resnet50_imagenet_graph\n    grid: {select.threshold: [0.65, 0.7]}\n")
    tasks = sweep.load_sweep(str(file), methods.options_of, need_environment=False).tasks
    assert [task.name for task in tasks] == [f"resnet50_imagenet_graph-threshold_{t}" for t in (0.65, 0.7)]
    assert sweep.find_sweep("graph_cifar10.yaml") == sweep.find_sweep("graph_cifar10")


def test_recipes_are_found_in_folders_of_any_working_directory(tmp_path, monkeypatch):
    """Those of the working directory come first; one name in two folders there is no answer."""
    monkeypatch.chdir(tmp_path)
    assert recipe_files.find("resnet50_graph").parent.name == "graph"
    assert "entropy_budgets" not in recipe_files.known_recipes()
    for folder in ("own", "sweeps"):
        (tmp_path / "recipes" / folder).mkdir(parents=True)
        (tmp_path / "recipes" / folder / "resnet50_graph.yaml").touch()
    assert recipe_files.find("resnet50_graph") == Path("recipes/own/resnet50_graph.yaml")
    (tmp_path / "recipes/other").mkdir()
    (tmp_path / "recipes/other/resnet50_graph.yaml").touch()
    assert "several files: recipes/other/resnet50_graph.yaml, recipes/own/resnet50_graph.yaml" in said("resnet50_graph")
    assert recipe_files.find("recipes/own/resnet50_graph") == Path("recipes/own/resnet50_graph.yaml")
    assert "Did you mean 'resnet50_mint'" in said("recipes/own/resnet50_mint.yaml")


def test_the_list_names_every_recipe_and_no_sweep(capsys):
    assert main(["list", "recipes", "--json"]) == 0
    listed = {name: Path(entry["file"]) for name, entry in json.loads(capsys.readouterr().out).items()}
    assert listed == recipe_files.known_recipes()
    assert listed["resnet50_graph"].parent.name == "graph"


def said(name: str) -> str:
    with pytest.raises(PruneError) as error:
        recipe_files.find(name)
    return str(error.value)


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ("resnet50", "resnet50_"), ("graph_resnet50", "resnet50_graph"), ("mint", "resnet50_mint"),
        ("resnet50_grahp", "resnet50_graph"), ("resnt50_mint", "resnet50_mint"), ("quikstart", "quickstart"),
        ("cifar10_chip", "resnet56_cifar10_chip"), ("hrel", "resnet56p_cifar10_hrel"),
    ],
)  # fmt: skip
def test_suggestions_weigh_words(asked, first):
    assert f"Did you mean '{first}" in said(asked)


def test_suggestions_know_backbone_method_and_data():
    l1 = said("resnet50_l1")
    assert "'resnet56_cifar10_l1'" in l1
    assert "'resnet50_graph'" in l1
    assert "No recipe has all of these words." in l1
    assert "method.name=NAME" in l1
    folders = recipe_files.suggestions("imagefolder", recipe_files.known_recipes())[0]
    assert "resnet18_folder_entropy" in folders
    assert "resnet50_graph" in folders
    assert not [name for name in folders if "cifar" in name]
    assert all(
        name.startswith("resnet50_") for name in recipe_files.suggestions("resnet50", recipe_files.known_recipes())[0]
    )
    assert all("resnet56_" in name for name in recipe_files.suggestions("resnet56", recipe_files.known_recipes())[0])


def test_where_no_recipe_is_near_the_way_to_one_is_said():
    text = said("swin")
    assert "Did you mean" not in text
    assert "how to write one: docs/recipes.md" in text
    assert "dist-prune list backbones" in text
    assert "No recipe has 'swin'" in said("swin_mint")

"""Every recipe that ships loads, traces and can reach its target; its header says what a reader needs."""

import itertools
import json
import re
from pathlib import Path

import pytest
import timm
import yaml

from dist_prune import methods
from dist_prune.cli.check import preview
from dist_prune.config import loading, recipe_files
from dist_prune.config.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))
FILES = [file for file in sorted((ROOT / "recipes").rglob("*.yaml")) if file not in SWEEPS]
# traced in the slow run only: large images, and networks that another recipe traces already
SLOW = [f for f in FILES if "image_size: 448" in f.read_text() or f.stem.endswith("cifar100_graph")]
SLOW += [f for f in FILES if f.stem.endswith("_v1") and not f.stem.startswith("vgg")]
SLOW += [f for f in FILES if f.stem in ("resnet50_cifar100_sensitivity", "resnet50_sensitivity")]
SLOW += [f for f in FILES if f.stem.endswith("_isomorphic") or f.stem.startswith(("ssdlite", "fasterrcnn"))]
SLOW += [f for f in FILES if f.stem in ("resnet56_cifar10_sensitivity", "vgg16_sensitivity")]
SLOW += [f for f in FILES if f.stem.endswith("_released") or "_scratch_" in f.stem or "_svhn_" in f.stem]
SLOW += [f for f in FILES if f.stem.startswith(("googlenet", "mobilenetv1", "vgg16_graph", "vgg19_graph"))]
SLOW += [f for f in FILES if f.stem.startswith(("resnet32p", "resnet44p", "mobilenetv2_cifar", "resnet18_mini"))]


def loaded(file: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    return loading.load(str(file), list(overrides), methods.options_of, need_environment=False)


def chosen(spec: Recipe):
    return methods.build(spec.method)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_is_valid(file):
    spec = loaded(file)
    assert spec.name == file.stem
    options = chosen(spec).options
    if file.stem.endswith("_released") and options.fidelity == "correct":
        assert spec.method["name"] == "sensitivity"  # its seven programs have other departures each
        assert options.quirks
        return
    assert options.fidelity == ("as_released" if file.stem.endswith(("_v1", "_released")) else "correct")


@pytest.mark.parametrize(
    "file", [pytest.param(f, marks=pytest.mark.slow if f in SLOW else ()) for f in FILES], ids=lambda file: file.stem
)
def test_the_network_of_a_recipe_can_be_cut(file):
    """Image folders are not here: their networks are traced with 1,000 classes."""
    spec = loaded(file)
    body = preview(spec, chosen(spec))
    assert any(not group["protected"] for group in body["groups"])
    assert body["warnings"] == []


def test_a_recipe_lies_in_its_paper_s_folder_and_no_two_have_one_name():
    """A bare name means one file; criteria that are not a paper's folder are baselines."""
    assert sorted(recipe_files.known_recipes()) == sorted(file.stem for file in FILES), (
        "two files of one name, or one not found"
    )
    assert len(FILES) > 55
    papers = {"graph", "mint", "dirichlet", "shapley", "sensitivity", "entropy"}
    for file in FILES:
        if file.stem != "quickstart":
            method, task = loaded(file).method["name"], loaded(file).task["name"]
            baselines = "baselines" if task == "classification" else task  # a task has a folder of its own
            assert file.parent.name == (method if method in papers else baselines), file
            assert file.parent.parent == ROOT / "recipes"
            assert recipe_files.find(file.stem).resolve() == file


@pytest.mark.parametrize("file", [f for f in FILES if f.stem.endswith("_v1")], ids=lambda file: file.stem)
def test_a_recipe_of_a_first_release_says_what_that_is(file):
    head = file.read_text().split("\nname:")[0].replace("\n#          ", "")
    assert "# _v1       the authors' first release (March 2023)" in head
    spec, epochs = loaded(file), re.search(r"finetuning takes (\d+) epochs with steps at (\d+) and (\d+)", head)
    assert epochs is not None
    assert [int(number) for number in epochs.groups()] == [spec.finetune.epochs, *spec.finetune.milestones]
    assert f"(recipe {file.stem.removesuffix('_v1')})" in head
    quirks = spec.method["quirks"]
    assert ("linear layers are re-initialised" in head) == ("fresh_classifier" in quirks)
    assert ("the hidden linear layer is cut like" in head) == ("narrow_classifier" in quirks)


def test_only_sparse_learning_goes_on_from_a_checkpoint():
    """A train section behind a checkpoint is a training: where a paper takes weights as they are, there is none."""
    found = {file.stem: loaded(file) for file in FILES}
    both = {name for name, spec in found.items() if spec.backbone.checkpoint and spec.train.epochs}
    assert {name for name in both if found[name].train.sparsity == "none"} == set()
    taught = {name for name, spec in found.items() if spec.backbone.pretrained and spec.train.epochs}
    assert taught == {"resnet18_folder", "resnet18_folder_taylor", "vgg16_cub200_graph", "vgg19_cub200_graph"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_opens_with_what_a_reader_needs(file):
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    for word in ("paper", "command", "cost"):
        assert any(line.startswith(f"# {word}") for line in head), f"{file.name} does not say its {word}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_that_fetches_weights_says_which(file):
    """timm's newest weights of a network are not those that a paper started from, and they change with timm."""
    backbone = loaded(file).backbone
    if not backbone.pretrained:
        assert "pretrained: true" not in file.read_text()
        return
    name, _, tag = backbone.name.partition(".")
    assert tag, f"{file.name}: pretrained weights without a tag are whatever timm has newest"
    assert f"{name.removesuffix('_pool7')}.{tag}" in timm.list_pretrained()
    if "76.1" in file.read_text():
        assert backbone.name == "resnet50.tv_in1k"


@pytest.mark.parametrize("file", [f for f in FILES if f.stem.endswith("_entropy")], ids=lambda file: file.stem)
def test_an_entropy_recipe_says_what_it_departs_from_and_how_to_undo_it(file):
    head = file.read_text().split("\nname:")[0]
    assert "# departs" in head
    assert "method.fidelity=as_released" in head
    back = [] if loaded(file).method["alpha"] == 1.01 else ["method.alpha=null"]
    assert all(word in head for word in back)
    method = loaded(file, ("method.fidelity=as_released", *back)).method
    assert (method["alpha"], method["width"], method["criterion"]) == (1.01, "aligned", "mi_rest")


def runs_of(sweep: Path) -> list[tuple[str, tuple[str, ...]]]:
    """(recipe, overrides) of every run of a sweep: each task is a base recipe and a grid of keys."""
    body = yaml.safe_load(sweep.read_text())
    assert set(body) == {"tasks"}
    runs = []
    for task in body["tasks"]:
        assert set(task) == {"base", "grid"}
        for values in itertools.product(*task["grid"].values()):
            runs.append(
                (task["base"], tuple(f"{k}={json.dumps(v)}" for k, v in zip(task["grid"], values, strict=True)))
            )
    return runs


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda file: file.stem)
def test_every_run_of_a_sweep_is_valid_and_no_two_are_the_same(sweep):
    runs = runs_of(sweep)
    assert len(set(runs)) == len(runs)
    for name, overrides in runs:
        spec = loaded(recipe_files.find(name), overrides)
        if spec.method["name"] == "graph":
            assert f"select.threshold={spec.select.threshold}" in overrides


def test_the_graph_paper_s_tables_are_covered():
    """Every row of both releases (specification, section 8) is a run of a sweep and stands in its recipe's header."""
    runs = {run for sweep in SWEEPS if sweep.stem.startswith("graph") for run in runs_of(sweep)}
    rows = [(f"{net}_{data}_graph{release}", threshold)
            for net in ("vgg16", "resnet56p", "resnet110p", "densenet40")
            for data, release in (("cifar10", ""), ("cifar10", "_v1"), ("cifar100", ""))
            for threshold in ((0.7, 0.75, 0.8) if net == "vgg16" else (0.65, 0.7, 0.75))]  # fmt: skip
    rows += [(f"resnet50_graph{release}", t) for release in ("", "_v1") for t in (0.65, 0.7)]
    rows += [("vgg16_cub200_graph", 0.85), ("vgg19_cub200_graph", 0.85)]
    for name, threshold in rows:
        assert (name, (f"select.threshold={threshold}",)) in runs
        head = recipe_files.find(name).read_text().split("name:")[0]
        assert any(line.split()[:2] == ["#", str(threshold)] and line.count("%") >= 2 for line in head.splitlines())
        assert "# measured  " in head
    doubtful = [file.stem for file in FILES if "DOUBTFUL" in file.read_text()]
    assert doubtful == ["densenet40_cifar100_graph", "vgg19_cub200_graph"]


@pytest.mark.parametrize("file", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda file: file.stem)
def test_launch_configs_are_accelerate_s(file):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(file)).num_processes >= 1


def test_a_finetuning_without_a_rate_has_its_own_default():
    for words, rate in ((["finetune.epochs=3"], 0.03), (["finetune=null"], 0.01), (["finetune={epochs: 3}"], 0.01)):
        assert loading.load("quickstart", words, methods.options_of).finetune.lr == rate
    assert loading.load("quickstart", ["train={epochs: 3}"], methods.options_of).train.lr == 0.1


def test_sections_that_share_an_anchor_are_changed_one_by_one(tmp_path):
    """An override, or one that empties a key, leaves the other sections of the same YAML anchor as they are."""
    (tmp_path / "mine.yaml").write_text(
        "backbone: {name: lenet5_mnist}\ndata: {source: digits}\nmethod: {name: l1}\n"
        "train: &both {epochs: 7, batch: 16, milestones: [2, 4]}\nfinetune: *both\n"
    )
    recipe = loading.load(str(tmp_path / "mine.yaml"), ["train.epochs=0", "train.batch="])
    assert (recipe.train.epochs, recipe.finetune.epochs) == (0, 7)
    assert (recipe.train.batch, recipe.finetune.batch) == (type(recipe.train)().batch, 16)
    shipped = loaded(next(f for f in FILES if f.stem == "lenet5_mnist_dirichlet"), ("train.epochs=0",))
    assert (shipped.train.epochs, shipped.finetune.epochs) == (0, 200)

"""The page of the papers: each recipe and key that it names exists, and no recipe of a paper is left out."""

import re
from collections import Counter
from pathlib import Path

from dist_prune import methods
from dist_prune.config import recipe_files
from dist_prune.config.training import Training

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/papers.md").read_text()
PAPERS = ("graph", "dirichlet", "shapley", "mint", "entropy", "sensitivity")
# scripts that a paper's repository runs -> number of its flags in the specifications
PROGRAMS = {
    "graph generate_prune_info": 6,
    "graph train": 9,
    "graph prune_*": 10,
    "shapley lenet_network_pruning": 19,
    "shapley vgg_load": 18,
    "shapley trainer_prune (ResNet-56)": 18,
    "shapley resnet50_run3": 36,
    "dirichlet WideResNet main_prune": 1,
    "mint train_stage1": 14,
    "mint pruning_1b": 10,
    "mint retrain_stage3": 27,
    "entropy pruning_filter_layers*": 12,
    "entropy pruning_filter_layers_resnet*": 1,
    "entropy pruning_filter_test_layers*": 8,
    "entropy pruning_filter_finetune_layer_fixRatio": 6,
    "sensitivity get_data": 2,
    "sensitivity main": 17,
    "sensitivity compress": 2,
}  # fmt: skip


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def _keys() -> set[str]:
    """Every key of a recipe, from the generated tables, which another test holds to the code."""
    text = (ROOT / "docs/recipes.md").read_text()
    keys = set(re.findall(r"^\| `([a-z_.]+)`", text, re.MULTILINE))
    keys |= {f"finetune.{key}" for key in Training.model_fields}
    return keys | {"method.name"} | {key.partition(".")[0] for key in keys}


def test_every_key_and_recipe_of_the_flags_exists():
    flags = PAGE.split("<!-- flags -->")[1].split("<!-- /flags -->")[0]
    rows, keys, recipes = _rows(flags), _keys(), set(recipe_files.known_recipes())
    assert Counter(row[0] for row in rows) == PROGRAMS, "a flag has no row"
    assert len({(row[0], row[1]) for row in rows}) == len(rows), "a flag stands there twice"
    for program, flag, here, remark in rows:
        assert re.fullmatch(r"`-{0,2}[\w-]+`", flag), (program, flag)
        assert here == "none" or re.fullmatch(r"`[a-z_.]+`", here), (program, flag, here)
        for name in re.findall(r"`([\w.]+)`", f"{here} {remark}"):
            assert name in keys | recipes | {"model_state_dict"}, (program, flag, name)


def test_every_recipe_of_a_paper_stands_in_the_table_of_rows():
    table = PAGE.split("## Rows and recipes")[1].split("## Programs and flags")[0]
    named = {(row[0], name) for row in _rows(table) for name in re.findall(r"`(\w+)`", row[2])}
    there = {(paper, file.stem) for paper in PAPERS for file in (ROOT / "recipes" / paper).glob("*.yaml")}
    assert named == there


def test_a_key_of_a_method_is_one_of_the_paper_s_method():
    """The Shapley paper's programs run the switches as well."""
    flags = PAGE.split("<!-- flags -->")[1].split("<!-- /flags -->")[0]
    for program, flag, here, remark in _rows(flags):
        paper = program.partition(" ")[0]
        keys = {"name"}.union(
            *(methods.options_of(m).model_fields for m in ((paper, "dirichlet") if paper == "shapley" else (paper,)))
        )
        used = set(re.findall(r"`method\.(\w+)`", f"{here} {remark}"))
        assert used <= keys, (program, flag, used - keys)

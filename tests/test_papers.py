"""The rows of benchmarks/papers.py: each is a valid recipe, and its figures make the table."""

import pytest

from benchmarks import papers
from benchmarks.papers_parts import tables
from benchmarks.papers_parts.rows import CASES
from dist_prune.config import loading


@pytest.mark.parametrize("case", CASES)
def test_every_row_is_a_recipe(case, tmp_path, monkeypatch):
    monkeypatch.setenv("DIST_PRUNE_DATA", str(tmp_path))
    given = CASES[case]
    dense = loading.load(given.recipe, [*given.words, *papers._dense()])
    assert dense.finetune.epochs == 0 and dense.method["name"] == "random"
    for row in given.rows:
        words = [*given.words, *row.words, "train.epochs=0", "backbone.checkpoint=x"]
        words += ["target={macs: 0.8}"] if row.like else []
        recipe = loading.load(row.recipe or given.recipe, words + list(row.grid[-1:]))
        is_cut_alone = any(other.bundle == row.name for other in given.rows)
        assert is_cut_alone or recipe.finetune.epochs >= 30, "the paper's length, or what two cores can"
        assert recipe.backbone.name == dense.backbone.name and recipe.data.source == dense.data.source
        assert {row.like, row.bundle, row.scores} <= {None, *(one.name for one in given.rows[: given.rows.index(row)])}
    assert given.dense_of is None or CASES[given.dense_of].recipe == given.recipe


def test_a_shorter_length_begins_no_training(tmp_path):
    """The dense network is not finetuned, and a row does not train it again."""
    rows = papers.Rows(tmp_path, 0, ["finetune.epochs=2", "train.epochs=1"])
    recipe = loading.load("lenet5_mnist_dirichlet", rows.overrides(papers._dense()))
    assert (recipe.train.epochs, recipe.finetune.epochs) == (1, 0)
    recipe = loading.load("lenet5_mnist_dirichlet", rows.overrides(["train.epochs=0", "backbone.checkpoint=x"]))
    assert (recipe.train.epochs, recipe.finetune.epochs) == (0, 2)


def test_rows_in_the_order_of_the_patterns():
    assert [row.name for _, _, row in papers.wanted(["as released"], [0], ["entropy"])] == ["as released"]
    assert {case for case, _, _ in papers.wanted(["*"], [0], ["mint"])} == {"mlp_mnist", "mlp_mnist_groups"}
    found = [(case, seed, row.name) for case, seed, row in papers.wanted(["lenet5_*:l1", "lenet5_mnist:l?"], [0, 1])]
    assert found == [
        ("lenet5_mnist", 0, "l1"), ("lenet5_fashion", 0, "l1"), ("lenet5_mnist", 1, "l1"), ("lenet5_fashion", 1, "l1"),
        ("lenet5_mnist", 0, "l2"), ("lenet5_mnist", 1, "l2"),
    ]  # fmt: skip


def test_the_table_has_means_deviations_and_what_was_not_run():
    def report(top1: float) -> dict:
        networks = {"dense": (99.0, 100), "pruned": (50.0, 40), "finetuned": (top1, 40)}
        found = {name: {"top1": figure, "macs": macs, "params": macs} for name, (figure, macs) in networks.items()}
        return found | {"commit": "1dfd23e", "environment": {"processor": "one"}}

    rows = [tables.figures("lenet5_mnist", "l1", seed, report(98.0 + seed), []) for seed in (0, 2)]
    rows += [tables.figures("lenet5_mnist", "random", 0, report(90.0), ["train.epochs=1"])]
    assert {(row["about"]["commit"], row["about"]["processor"]) for row in rows} == {("1dfd23e", "one")}
    kept = tables.merge(tables.merge([], rows), rows[:1])
    assert len(kept) == 3
    text = tables.markdown(kept)
    assert "| l1 | not at hand | 0.400 | 0.400 | 50.00 ± 0.00 | 99.00 ± 1.41 | 2 |" in text
    assert "Shortened by `train.epochs=1`: no figure of the paper's" in text
    assert "| fisher | not at hand | | | | not run | 0 |" in text
    runs = [98.0, 99.0, 100.0]
    rows = [tables.figures("mlp_mnist", "random", 0, report(98.0) | {"reruns": {"top1": runs, "mean": 99.0}}, [])]
    assert "| random | none | 0.400 | 0.400 | 50.00 | 99.00 ± 1.00 | 1 |" in tables.markdown(rows)
    assert "Dense: 99.00 ± 0.00; paper or program: 99.05 to 99.27." in text

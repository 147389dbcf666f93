"""What all methods that rank channels have in common: one base, one way to combine layers, orders, ties said."""

import sys
from typing import Literal, get_args

import pytest
import torch
from pydantic import ValidationError

from dist_prune import methods
from dist_prune.errors import PruneError
from dist_prune.methods.base import (
    CoupledOptions,
    MethodOptions,
    QuirkOptions,
    RankingMethod,
    RankingOptions,
    WeightRanking,
)
from dist_prune.pruning.selection import ranking
from dist_prune.pruning.selection.group_scores import reduce_group
from dist_prune.pruning.selection.ranking import SelectionRequest
from tests.support import tiny

RANKING = [name for name in methods.list_names() if name != "graph"]  # its counts fall out of a threshold


@pytest.mark.parametrize("name", RANKING)
def test_every_ranking_method_has_the_base_and_its_keys(name):
    kind = methods.find(name)
    assert issubclass(kind, RankingMethod)
    assert issubclass(kind.Options, RankingOptions)
    assert "normalise" not in kind.Options.score_options(), "runs that differ in it share one score file"


@pytest.mark.parametrize("name", [n for n in RANKING if n not in ("sensitivity", "entropy", "hrel", "chip", "mint")])
def test_orders_are_those_of_plans_and_normalise_decides_between_groups(name):
    bench, method = tiny.bench(tiny.network()), tiny.method(name)
    channels = method.prunable(bench.graph)
    bench.graph = channels
    scores = method.score(bench)
    orders = method.orders(scores, channels, SelectionRequest())
    for group in channels.free:
        assert sorted(orders[group.name]) == list(range(group.width))
    for share in (0.5, 0.9):
        plan = method.select(scores, channels, SelectionRequest(keep_ratio=share))
        for group in channels.free:
            gone = group.width - len(plan.kept(group.name))
            assert set(orders[group.name][:gone]).isdisjoint(plan.kept(group.name))
    plans = {}
    for flag in (True, False):
        other = type(method)(method.options.model_copy(update={"normalise": flag}))
        plans[flag] = other.select(scores, channels, SelectionRequest(keep_ratio=0.5, scope="global")).fingerprint
    if name not in ("random", "dirichlet", "shapley"):  # of one scale, sums of 1, three sets only
        assert plans[True] != plans[False]


def test_layers_are_combined_in_one_place_and_signs_do_not_cancel():
    assert not hasattr(ranking, "combined")
    parts = [torch.tensor([1.0, -1.0, 4.0]), torch.tensor([2.0, 2.0, -2.0])]
    even = [parts[0].double() / 2, parts[1].double() / 2]
    assert torch.allclose(reduce_group(parts, "sum"), even[0] + even[1])
    assert torch.allclose(reduce_group(parts, "mean"), (even[0] + even[1]) / 2)
    assert torch.equal(reduce_group(parts, "leader"), parts[0].double())
    for name in ("l1", "l2", "fpgm", "whc"):
        assert issubclass(methods.find(name), WeightRanking)
        assert issubclass(methods.find(name).Options, CoupledOptions)


def test_taylor_on_a_new_network_says_that_it_ranks_nothing():
    """Residual branches whose last norm starts at zero: their inner channels have gates of exactly 0."""
    model = tiny.network()
    for name, module in model.named_modules():
        if name.endswith("bn2"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    bench, method = tiny.bench(model), tiny.method("taylor")
    scores = method.score(bench)
    (text,) = method.warnings(scores, bench.graph)
    assert "layer1.0.conv1" in text
    assert "0" in text
    assert "drawn from the seed" in text
    plans = [method.select(scores, bench.graph, SelectionRequest(keep_ratio=0.5, seed=seed)) for seed in (0, 1)]
    assert plans[0].kept("layer1.0.conv1") != plans[1].kept("layer1.0.conv1")
    assert plans[0].kept("layer1.0.conv1") != list(range(8, 16))
    assert tiny.method("taylor").warnings(method.score(tiny.bench(tiny.network())), bench.graph) == []


QUIRKS = {
    "dirichlet": {"batch_statistics", "mixed_images", "dropout"},
    "entropy": {"softmax_labels", "wider_kernel", "top_bin", "last_batch", "conv_sign", "augmented"},
    "fisher": {"batch_mean", "train_mode", "before_norm"},
    "graph": {"train_mode", "augmented"},
    "mint": {
        "independent_samples", "with_replacement", "duplicates_unconnected", "swapped_neighbour", "edge_numbers",
        "clamped_score", "numbered_parents", "distinct_cap",
    },
    "sensitivity": {"raw_logits", "reshape", "small_mask", "fresh_norms", "padding_32"},
    "shapley": {"raw_outputs", "training_images", "augmented_images"},
}  # fmt: skip


@pytest.mark.parametrize("name", methods.list_names())
def test_quirks_and_fidelity_have_one_implementation(name):
    """as_released is the quirks of the authors' program; a quirk alone is itself; a method without any says so."""
    kind = methods.find(name)
    assert kind.has is RankingMethod.has
    if name not in QUIRKS:
        assert not issubclass(kind.Options, QuirkOptions)
        with pytest.raises(ValidationError, match="has one form, correct"):
            kind.Options(fidelity="as_released")
        with pytest.raises(ValidationError, match="at most 0 items"):
            kind.Options(quirks=("dropout",))
        return
    assert issubclass(kind.Options, QuirkOptions)
    assert not {"fidelity", "quirks", "has"} & (vars(kind.Options).keys() | kind.Options.__annotations__.keys())
    every = get_args(sys.modules[kind.__module__].Quirk)
    plain, released = (kind(kind.Options.model_validate({"fidelity": word})) for word in ("correct", "as_released"))
    assert not any(plain.has(quirk) for quirk in every)
    assert {quirk for quirk in every if released.has(quirk)} == QUIRKS[name]
    alone = kind(kind.Options.model_validate({"quirks": every[-1:]}))
    assert [quirk for quirk in every if alone.has(quirk)] == [every[-1]]
    with pytest.raises(ValidationError, match=every[0]):
        kind.Options.model_validate({"quirks": ["no_such_quirk"]})
    with pytest.raises(KeyError, match="no_such_quirk"):
        plain.has("no_such_quirk")


def test_as_released_says_which_quirks_it_stands_for():
    class Some(QuirkOptions[Literal["a", "b"]], RankingOptions):
        released = ("a",)

    class Every(QuirkOptions[Literal["a", "b"]], RankingOptions):
        extra: int = 0

    assert Some.model_fields["fidelity"].description == "as_released: quirks a"
    assert Every.model_fields["fidelity"].description == "as_released: every quirk"
    assert "the only one here" in str(MethodOptions.model_fields["fidelity"].description)
    assert Every(fidelity="as_released").has("b")
    assert not Some(fidelity="as_released").has("b")


PAPER = """
from dist_prune.methods import base
from dist_prune.methods.{name}.machinery import squares

class Paper(base.WeightRanking):
    paper = "a paper in a folder"

    def filter_scores(self, filters):
        return squares(filters)
"""


@pytest.fixture
def folder_of_methods(tmp_path, monkeypatch):
    """A folder whose modules are found as if they lay in dist_prune/methods."""
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    before = set(sys.modules)
    yield tmp_path
    for module in set(sys.modules) - before:
        sys.modules.pop(module)


@pytest.mark.parametrize("exported", [True, False], ids=["exported", "defined in __init__"])
def test_a_method_that_is_a_folder_is_found(folder_of_methods, exported):
    name = f"folder_{exported}".lower()
    package = folder_of_methods / name
    package.mkdir()
    (package / "machinery.py").write_text("def squares(filters):\n    return filters.square().sum(1)\n")
    (package / "method.py").write_text(PAPER.format(name=name))
    text = f"from dist_prune.methods.{name}.method import Paper\n" if exported else PAPER.format(name=name)
    (package / "__init__.py").write_text(text)
    assert name in methods.list_names()
    kind = methods.find(name)
    assert (kind.__name__, kind.paper) == ("Paper", "a paper in a folder")
    assert methods.options_of(name) is CoupledOptions
    bench, paper = tiny.bench(tiny.network()), kind(kind.Options())
    plan = paper.select(paper.score(bench), bench.graph, SelectionRequest(keep_ratio=0.5))
    squares = (
        bench.weight(next(site for site in bench.sites if site.name == "layer1.0.conv1")).flatten(1).square().sum(1)
    )
    assert plan.kept("layer1.0.conv1") == sorted(squares.argsort()[8:].tolist())


def test_a_folder_that_exports_no_method_says_what_to_write(folder_of_methods):
    (folder_of_methods / "empty_paper").mkdir()
    (folder_of_methods / "empty_paper/__init__.py").write_text("from dist_prune.methods.base import Method\n")
    with pytest.raises(PruneError, match=r"methods/empty_paper/__init__\.py must export exactly one Method class"):
        methods.find("empty_paper")


def test_a_method_is_built_from_its_section():
    method = methods.build({"name": "entropy", "batch": 7, "alpha": 2.0})
    assert type(method) is methods.find("entropy")
    assert (method.options.batch, method.options.alpha, method.options.bins) == (7, 2.0, 30)
    with pytest.raises(PruneError, match=r"unknown method 'entropi'\. Did you mean 'entropy'"):
        methods.build({"name": "entropi"})
    with pytest.raises(ValueError, match="batches"):
        methods.build({"name": "entropy", "batches": 7})

"""What all methods that rank channels have in common: one base, one way to combine layers, orders, ties said."""

import pytest
import torch

from dist_prune import methods
from dist_prune.errors import PruneError
from dist_prune.methods.method import CoupledOptions, Ranking, RankingOptions
from dist_prune.pruning import choose
from dist_prune.pruning.choose import Request
from dist_prune.pruning.combine import combined
from tests import tiny

RANKING = [name for name in methods.names() if name != "graph"]  # its counts fall out of a threshold


@pytest.mark.parametrize("name", RANKING)
def test_every_ranking_method_has_the_base_and_its_keys(name):
    kind = methods.find(name)
    assert issubclass(kind, Ranking)
    assert issubclass(kind.Options, RankingOptions)
    assert "normalise" not in kind.Options.score_options(), "runs that differ in it share one score file"


@pytest.mark.parametrize("name", [n for n in RANKING if n not in ("sensitivity", "entropy", "hrel", "chip", "mint")])
def test_orders_are_those_of_plans_and_normalise_decides_between_groups(name):
    bench, method = tiny.bench(tiny.network()), tiny.method(name)
    channels = method.limits(bench.channels)
    bench.channels = channels
    scores = method.score(bench)
    orders = method.orders(scores, channels, Request())
    for group in channels.free:
        assert sorted(orders[group.name]) == list(range(group.width))
    for share in (0.5, 0.9):
        plan = method.select(scores, channels, Request(keep_ratio=share))
        for group in channels.free:
            gone = group.width - len(plan.kept(group.name))
            assert set(orders[group.name][:gone]).isdisjoint(plan.kept(group.name))
    plans = {}
    for flag in (True, False):
        other = type(method)(method.options.model_copy(update={"normalise": flag}))
        plans[flag] = other.select(scores, channels, Request(keep_ratio=0.5, scope="global")).fingerprint
    if name not in ("random", "dirichlet", "shapley"):  # of one scale, sums of 1, three sets only
        assert plans[True] != plans[False]


def test_layers_are_combined_in_one_place_and_signs_do_not_cancel():
    assert not hasattr(choose, "combined")
    parts = [torch.tensor([1.0, -1.0, 4.0]), torch.tensor([2.0, 2.0, -2.0])]
    even = [parts[0].double() / 2, parts[1].double() / 2]
    assert torch.allclose(combined(parts, "sum"), even[0] + even[1])
    assert torch.allclose(combined(parts, "mean"), (even[0] + even[1]) / 2)
    assert torch.equal(combined(parts, "leader"), parts[0].double())
    for name in ("l1", "l2", "fpgm", "whc"):
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
    (text,) = method.warnings(scores, bench.channels)
    assert "layer1.0.conv1" in text
    assert "0" in text
    assert "drawn from the seed" in text
    plans = [method.select(scores, bench.channels, Request(keep_ratio=0.5, seed=seed)) for seed in (0, 1)]
    assert plans[0].kept("layer1.0.conv1") != plans[1].kept("layer1.0.conv1")
    assert plans[0].kept("layer1.0.conv1") != list(range(8, 16))
    assert tiny.method("taylor").warnings(method.score(tiny.bench(tiny.network())), bench.channels) == []


def test_a_method_is_built_from_its_section():
    method = methods.build({"name": "entropy", "batch": 7, "alpha": 2.0})
    assert type(method) is methods.find("entropy")
    assert (method.options.batch, method.options.alpha, method.options.bins) == (7, 2.0, 30)
    with pytest.raises(PruneError, match=r"unknown method 'entropi'\. Did you mean 'entropy'"):
        methods.build({"name": "entropi"})
    with pytest.raises(ValueError, match="batches"):
        methods.build({"name": "entropy", "batches": 7})

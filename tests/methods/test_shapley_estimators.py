"""Shapley values of games that are known in full; what random sets and permutations look like."""

import itertools
import math

import pytest
import torch

from dist_prune.errors import PruneError
from dist_prune.methods.shapley import estimators
from dist_prune.pruning.rng import seeded_generator

C = 5


def game(off: torch.Tensor) -> torch.Tensor:
    """(m,) accuracy of a game with interactions of two and of three, when ``off`` (m, C) is removed."""
    generator = torch.Generator().manual_seed(3)
    single = 10 * torch.rand(C, generator=generator, dtype=torch.float64)
    pair = 4 * torch.rand(C, C, generator=generator, dtype=torch.float64).triu(1)
    here = 1 - off.double()
    return here @ single + ((here @ pair) * here).sum(1) + 8 * here[:, 0] * here[:, 1] * here[:, 4]


def everything() -> torch.Tensor:
    return estimators.subsets(C, range(C + 1))


def value(removed: tuple[int, ...]) -> float:
    return float(game(torch.tensor([[c in removed for c in range(C)]])))


def exact() -> torch.Tensor:
    """By the definition: the mean marginal loss over all C! orders."""
    total = torch.zeros(C, dtype=torch.float64)
    for order in itertools.permutations(range(C)):
        for place, c in enumerate(order):
            total[c] += value(order[:place]) - value(order[: place + 1])
    return total / math.factorial(C)


def ends() -> tuple[float, float]:
    return value(()), value(tuple(range(C)))


def test_all_sizes_give_the_exact_values():
    off = everything()
    assert torch.allclose(
        estimators.values_by_size(off, game(off), estimators.sizes_of(C, C, False)), exact(), atol=1e-12
    )
    assert torch.allclose(
        estimators.values_by_size(off, game(off), estimators.sizes_of(C, C, True)), exact(), atol=1e-12
    )


def test_one_step_is_leave_one_out():
    off = estimators.subsets(C, estimators.sizes_of(C, 1, False))
    found = estimators.values_by_size(off, game(off), estimators.sizes_of(C, 1, False))
    assert torch.allclose(C * found, torch.tensor([value(()) - value((c,)) for c in range(C)], dtype=torch.float64))
    last = estimators.sizes_of(C, 1, True)
    off = estimators.subsets(C, last)
    others = [tuple(o for o in range(C) if o != c) for c in range(C)]
    alone = torch.tensor([value(o) - value(tuple(range(C))) for o in others], dtype=torch.float64)
    assert torch.allclose(C * estimators.values_by_size(off, game(off), last), alone)


def test_kernel_shap_on_the_whole_game_is_exact():
    """Every size as often as every other, as the draws have it in the long run."""
    sets = everything()[1:-1]
    times = {size: 10 // math.comb(C, size) for size in range(1, C)}  # 5, 10, 10, 5 sets: 10 of each size
    off = torch.cat([row[None].expand(times[int(row.sum())], -1) for row in sets])
    found = estimators.kernel_shap(off, game(off), *ends())
    assert torch.allclose(found, exact(), atol=1e-10)
    plain, _ = estimators.least_squares(off, game(off))
    assert not torch.allclose(plain, exact(), atol=1e-2), "the released regression has another optimum"
    assert estimators.rank_correlation(plain, exact()) == pytest.approx(1), "and the same ranking here"


@pytest.mark.parametrize("samples", [C + 1, 40])
def test_regressions_find_an_additive_game_as_soon_as_they_can(samples):
    weights = torch.tensor([3.0, -1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    ones = torch.eye(C, dtype=torch.bool)  # with none removed and each alone: as few as there are unknowns
    off = torch.cat([ones, ~ones[:1], estimators.random_sets(C, 0, samples - C - 1, lambda n: seeded_generator(1, n))])
    accuracy = 7 + (~off).double() @ weights
    found, errors = estimators.least_squares(off, accuracy)
    assert torch.allclose(found, weights, atol=1e-10)
    assert (errors is None) == (samples == C + 1)
    assert torch.allclose(estimators.kernel_shap(off, accuracy, 7 + float(weights.sum()), 7.0), weights, atol=1e-10)


def test_every_permutation_adds_up():
    orders = estimators.random_permutations(C, 4, lambda n: seeded_generator(2, n))
    off = estimators.permutation_prefixes(C, 0, 4 * (C - 1), lambda n: seeded_generator(2, n))
    for row, (p, j) in zip(off, itertools.product(range(4), range(C - 1)), strict=True):
        assert set(row.nonzero()[:, 0].tolist()) == set(orders[p, : j + 1].tolist())
    full, empty = ends()
    steps = estimators.marginal_losses(orders, game(off).view(4, C - 1), full, empty)
    assert torch.allclose(steps.sum(1), torch.full((4,), full - empty, dtype=torch.float64), atol=1e-12)
    first = int(orders[0, 0])
    assert float(steps[0, first]) == pytest.approx(full - value((first,)))
    many = estimators.random_permutations(C, 3000, lambda n: seeded_generator(2, n))
    off = estimators.permutation_prefixes(C, 0, 3000 * (C - 1), lambda n: seeded_generator(2, n))
    mean = estimators.marginal_losses(many, game(off).view(3000, C - 1), full, empty).mean(0)
    assert torch.allclose(mean, exact(), atol=0.35)


def test_random_sets_come_from_their_number_alone():
    whole = estimators.random_sets(9, 0, 200, lambda n: seeded_generator(5, n))
    assert torch.equal(whole[37:41], estimators.random_sets(9, 37, 41, lambda n: seeded_generator(5, n)))
    assert set(whole.sum(1).tolist()) == set(range(1, 9)), "every size, none and all excepted"


def test_reliability_grows_with_samples():
    full, empty = ends()

    def reliable(count: int) -> float:
        orders = estimators.random_permutations(C, count, lambda n: seeded_generator(7, n))
        off = estimators.permutation_prefixes(C, 0, count * (C - 1), lambda n: seeded_generator(7, n))
        steps = estimators.marginal_losses(orders, game(off).view(count, C - 1), full, empty)
        return estimators.reliability(steps.mean(0), steps.std(0) / count**0.5)

    assert reliable(4) < reliable(64) < 1
    assert reliable(64) > 0.95
    assert estimators.reliability(torch.ones(3), torch.ones(3)) == 0
    assert estimators.reliability(torch.ones(3), None) == 0


def test_the_oracle_knows_the_best_set():
    off = everything()
    accuracy, values = game(off), exact()
    for size in (1, 2, 3):
        best = max(itertools.combinations(range(C), size), key=value)
        lowest = set(values.argsort()[:size].tolist())
        assert estimators.oracle_overlap(off, accuracy, values, size) == len(lowest & set(best)) / size
    assert estimators.oracle_overlap(off, accuracy, -values, 1) == 0
    assert estimators.oracle_overlap(off[:-8], accuracy[:-8], values, 3) is None, "not every set of 3 is known"
    assert estimators.oracle_overlap(off, accuracy, values, 2, adding=True) in (0.5, 1.0)


def test_nobody_evaluates_a_million_sets():
    with pytest.raises(PruneError, match=r"method.k: .* sets of 0 to 8 of 64 channels are too many"):
        estimators.subset_count(64, estimators.sizes_of(64, 8, False))


def additive(width: int, samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(C,) values drawn from the seed, which add up to 70 points on average; random sets; accuracy above a floor of
    20."""
    worth = torch.rand(width, generator=seeded_generator(seed, "worth"), dtype=torch.float64) * 140 / width
    off = estimators.random_sets(width, 0, samples, lambda n: seeded_generator(seed, n))
    return worth, off, 20 + (~off).double() @ worth


def uncentred(off: torch.Tensor, accuracy: torch.Tensor) -> torch.Tensor:
    """The shortest solution with a column of ones: where sets are few it shrinks the intercept as well."""
    design = torch.cat([off.double(), torch.ones(len(off), 1, dtype=torch.float64)], 1)
    return -torch.linalg.lstsq(design, accuracy[:, None], driver="gelsd").solution[:-1, 0]


@pytest.mark.parametrize(
    ("width", "samples", "centred", "plain"),
    [(25, 20, 0.852, 0.250), (64, 30, 0.604, 0.007), (100, 30, 0.502, -0.022), (512, 300, 0.775, 0.054)],
)
def test_fewer_sets_than_channels_rank_by_the_centred_regression(width, samples, centred, plain):
    """Mean rank correlation with the true values of additive games, 8 seeds."""
    found, before = [], []
    for seed in range(8):
        worth, off, accuracy = additive(width, samples, seed)
        values, errors = estimators.least_squares(off, accuracy)
        assert errors is None
        found.append(estimators.rank_correlation(values, worth))
        before.append(estimators.rank_correlation(uncentred(off, accuracy), worth))
    assert sum(found) / 8 == pytest.approx(centred, abs=0.002)
    assert sum(before) / 8 == pytest.approx(plain, abs=0.002)


@pytest.mark.parametrize("samples", [28, 60])
def test_above_the_threshold_both_regressions_are_one(samples):
    _, off, accuracy = additive(25, samples, 0)
    noisy = accuracy + torch.rand(samples, generator=seeded_generator(0, "noise"), dtype=torch.float64)
    values, errors = estimators.least_squares(off, noisy)
    assert torch.allclose(values, uncentred(off, noisy), atol=1e-11, rtol=0)
    assert errors is not None
    design = torch.cat([off.double(), torch.ones(samples, 1, dtype=torch.float64)], 1)
    rest = noisy - design @ torch.linalg.lstsq(design, noisy[:, None]).solution[:, 0]
    spread = torch.linalg.inv(design.T @ design).diagonal()[:-1] * (rest @ rest) / (samples - 26)
    assert torch.allclose(errors, spread.sqrt(), atol=1e-9)


@pytest.mark.parametrize("samples", [3, 12, 20, 40])
def test_how_channels_are_numbered_moves_no_value(samples):
    worth, off, accuracy = additive(20, samples, 1)
    accuracy = accuracy + off[:, 3] * off[:, 7] * 5.0  # not additive: nothing fits it exactly
    full, empty = 20 + float(worth.sum()), 20.0
    renumbered = torch.randperm(20, generator=seeded_generator(4))
    for values in (
        lambda rows: estimators.kernel_shap(rows, accuracy, full, empty),
        lambda rows: estimators.least_squares(rows, accuracy)[0],
    ):
        assert torch.allclose(values(off[:, renumbered]), values(off)[renumbered], atol=1e-9, rtol=0)
    assert float(estimators.kernel_shap(off, accuracy, full, empty).sum()) == pytest.approx(full - empty)


def test_as_many_sets_as_unknowns_is_the_worst_number():
    """Accuracies of an additive game with noise of half a point; mean rank correlation over 8 seeds."""

    def ranks(samples: int) -> float:
        found = []
        for seed in range(8):
            worth, off, accuracy = additive(64, samples, seed)
            noisy = accuracy + 0.5 * torch.randn(
                samples, generator=seeded_generator(seed, "noise"), dtype=torch.float64
            )
            found.append(estimators.rank_correlation(estimators.least_squares(off, noisy)[0], worth))
        return sum(found) / len(found)

    assert ranks(65) < 0.4 < 0.5 < ranks(30) < 0.9 < ranks(130)
    assert estimators.near_threshold(65, 64)
    assert not estimators.near_threshold(30, 64)
    assert not estimators.near_threshold(130, 64)
    assert estimators.near_threshold(512, 512)
    assert estimators.samples_clear_of_threshold([64, 128, 256, 512], 1026) == 1026
    assert estimators.samples_clear_of_threshold([64, 128], 130) == 155, "clear of the wider group as well"

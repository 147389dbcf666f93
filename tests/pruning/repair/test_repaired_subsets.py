"""Backward elimination against brute force: every subset of a few channels, solved by least squares on the rows."""

from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor

from dist_prune.pruning.repair.elimination import PENDING, Reader, backward_elimination

ROWS, CHANNELS, RIDGE = 400, 5, 1e-3
Rows = tuple[Tensor, Tensor, Tensor]  # x (rows, D), W (D, O), columns (C, k)


def reader_rows(seed: int, taps: int, outputs: int, twin: bool = False) -> Rows:
    """Correlated inputs with means, weights, and the columns of each channel, which are not in order."""
    generator = torch.Generator().manual_seed(seed)
    width = CHANNELS * taps
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = normal(ROWS, width) @ normal(width, width) + 3 * normal(width)
    columns = torch.randperm(width, generator=generator).view(CHANNELS, taps)
    if twin:
        x[:, columns[3]] = x[:, columns[1]]
    return x, normal(width, outputs), columns


def reader_of(rows: Rows, ridge: float = RIDGE) -> Reader:
    x, weight, columns = rows
    return Reader(torch.cov(x.T, correction=0), weight.clone(), columns, ridge)


def brute_force(rows: Rows, removed: tuple[int, ...], ridge: float = RIDGE) -> tuple[float, Tensor]:
    """The smallest mean square error + ridge |W - W'|^2 without some channels, and the weights, by lstsq.

    The bias is a column of ones, the ridge is rows of its root.
    """
    x, weight, columns = rows
    n, width = x.shape
    kept = [i for i in range(width) if i not in set(columns[list(removed)].flatten().tolist())]
    centred = x - x.mean(0)
    root = (ridge * centred.square().mean() * n).sqrt()
    penalty = root * torch.eye(width, dtype=torch.float64)
    design = torch.cat([torch.cat([x[:, kept], torch.ones(n, 1, dtype=torch.float64)], 1),
                        torch.cat([penalty[:, kept], torch.zeros(width, 1, dtype=torch.float64)], 1)])  # fmt: skip
    wanted = torch.cat([x @ weight, penalty @ weight])
    solution = torch.linalg.lstsq(design, wanted, driver="gelsd").solution
    error = float((wanted - design @ solution).square().sum() / n)
    full = torch.zeros_like(weight)
    full[kept] = solution[:-1]
    return error / float((centred @ weight).square().sum() / n), full


@pytest.mark.parametrize(("taps", "outputs"), [(1, 3), (2, 4), (3, 1)])
def test_every_subset_is_repaired_as_by_brute_force(taps, outputs):
    """What each further channel costs, and the weights left, whatever the order of removal."""
    rows = reader_rows(0, taps, outputs)
    for size in range(CHANNELS):
        for removed in combinations(range(CHANNELS), size):
            reader = reader_of(rows)
            for channel in reversed(removed):
                reader.remove(channel)
            error, weight = brute_force(rows, removed)
            assert torch.allclose(reader.weight, weight, rtol=1e-6, atol=1e-8)
            left = [channel for channel in range(CHANNELS) if channel not in removed]
            expected = torch.tensor([brute_force(rows, (*removed, c))[0] - error for c in left], dtype=torch.float64)
            assert torch.allclose(reader.losses(torch.tensor(left)), expected, rtol=1e-6, atol=1e-10)


def test_the_order_of_removal_does_not_matter():
    rows = reader_rows(1, 2, 3)
    readers = []
    for order in permutations((0, 2, 4)):
        readers.append(reader_of(rows))
        for channel in order:
            readers[-1].remove(channel)
    assert all(torch.allclose(r.weight, readers[0].weight, atol=1e-9) for r in readers)
    assert all(torch.allclose(r.inverse, readers[0].inverse, rtol=1e-6, atol=1e-9) for r in readers)


def test_many_removals_stay_exact():
    """After 60 of 80 channels, more columns than wait for one product, the weights are those of one solution."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(500, 160, generator=generator, dtype=torch.float64).cumsum(1) / 10
    weight = torch.randn(160, 7, generator=generator, dtype=torch.float64)
    rows = x, weight, torch.randperm(160, generator=generator).view(80, 2)
    assert PENDING < 120
    reader, spent = reader_of(rows), 0.0
    gone = torch.randperm(80, generator=generator)[:60].tolist()
    for channel in gone:
        spent += float(reader.losses(torch.tensor([channel])))
        reader.remove(channel)
    error, expected = brute_force(rows, tuple(gone))
    assert torch.allclose(reader.weight, expected, rtol=1e-6, atol=1e-7)
    assert spent == pytest.approx(error, rel=1e-6)
    kept = torch.tensor([c for c in range(80) if c not in set(gone)])
    columns = rows[2][kept]
    whole = reader.inverse[columns[:, :, None], columns[:, None, :]]
    assert torch.allclose(reader.blocks[kept], whole, rtol=1e-7, atol=1e-9)


def test_greedy_choice_is_near_the_best_of_all_subsets():
    """Over 40 problems the channels that go cost at most a third more than the best subset of their number."""
    chosen = best = single = 0.0
    for seed in range(40):
        rows = reader_rows(seed, 1, 3)
        alone = reader_of(rows).losses(torch.arange(CHANNELS)).argsort().tolist()
        order = backward_elimination([reader_of(rows)], CHANNELS).argsort().tolist()
        for size in (2, 3):
            subsets = [brute_force(rows, removed)[0] for removed in combinations(range(CHANNELS), size)]
            found = brute_force(rows, tuple(order[:size]))[0]
            assert found >= min(subsets) * (1 - 1e-9)
            chosen, best = chosen + found, best + min(subsets)
            single += brute_force(rows, tuple(alone[:size]))[0]
    assert chosen < 4 / 3 * best
    assert chosen < single, "judged once, without the repair of the earlier ones, channels are chosen worse"


def test_one_of_two_equal_channels_costs_nothing_and_then_the_other_does():
    rows = reader_rows(2, 2, 3, twin=True)
    reader = reader_of(rows, 1e-9)
    worth = backward_elimination([reader_of(rows, 1e-9)], CHANNELS)
    first, second = sorted((1, 3), key=lambda channel: float(worth[channel]))
    assert int(worth.argmin()) == first
    assert float(worth[first]) < 1e-8
    assert float(worth[second]) > 1e-2
    reader.remove(first)
    x, weight, _ = rows
    shift = x.mean(0) @ (weight - reader.weight)
    assert torch.allclose(x @ reader.weight + shift, x @ weight, atol=1e-5), "the other one takes its place"


def test_channels_that_are_never_on_go_first():
    x, weight, columns = reader_rows(3, 1, 2)
    x[:, columns[[0, 4]].flatten()] = 7.0  # constants: the bias takes them over
    worth = backward_elimination([reader_of((x, weight, columns))], CHANNELS)
    assert set(worth.argsort()[:2].tolist()) == {0, 4}
    assert len(set(worth.tolist())) == CHANNELS, "the values tell the order"

"""Losses of repaired readers against brute force over all subsets."""

import itertools

import pytest
import torch

from dist_prune.pruning.repair.elimination import Reader, backward_elimination
from dist_prune.pruning.repair.second_moments import ExactSum

CHANNELS, TAPS, OUTPUTS = 5, 2, 3


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (n, C k) centred, W (C k, O), and the columns of each channel."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn((CHANNELS * TAPS, CHANNELS * TAPS), generator=draw, dtype=torch.float64)
    x = torch.randn((200, CHANNELS * TAPS), generator=draw, dtype=torch.float64) @ mix
    x -= x.mean(0)
    weight = torch.randn((CHANNELS * TAPS, OUTPUTS), generator=draw, dtype=torch.float64)
    return x, weight, torch.arange(CHANNELS * TAPS).view(CHANNELS, TAPS)


def error(x: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor, kept: tuple[int, ...]) -> float:
    """The share of the outputs' variance that the best weights of the kept channels cannot give."""
    wanted = x @ weight
    if not kept:
        return 1.0
    inputs = x[:, columns[list(kept)].flatten()]
    best = torch.linalg.lstsq(inputs, wanted).solution
    return float((inputs @ best - wanted).square().sum() / wanted.square().sum())


def reader(x: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor) -> Reader:
    return Reader(x.T @ x / len(x), weight, columns, ridge=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_losses_of_any_sequence_add_up_to_the_error_of_the_subset(seed):
    x, weight, columns = problem(seed)
    for gone in itertools.chain.from_iterable(itertools.permutations(range(CHANNELS), n) for n in (1, 2, 3)):
        own, total, left = reader(x, weight, columns), 0.0, list(range(CHANNELS))
        for channel in gone:
            losses = own.losses(torch.tensor(left))
            total += float(losses[left.index(channel)])
            own.remove(channel)
            left.remove(channel)
        assert total == pytest.approx(error(x, weight, columns, tuple(left)), rel=1e-6, abs=1e-9)


def test_elimination_removes_what_costs_least_over_all_readers():
    readers = [problem(seed) for seed in (0, 1)]
    worth = backward_elimination([reader(*one) for one in readers], CHANNELS)
    left, before = list(range(CHANNELS)), 0.0
    for channel in worth.argsort().tolist():
        after = {c: sum(error(*one, tuple(i for i in left if i != c)) for one in readers) for c in left}
        assert min(after, key=after.__getitem__) == channel
        assert float(worth[channel]) >= after[channel] - before - 1e-6
        before = after[channel]
        left.remove(channel)


def test_a_duplicate_is_worth_nothing():
    x, weight, columns = problem()
    x[:, columns[3]] = x[:, columns[1]]
    worth = backward_elimination([Reader(x.T @ x / len(x), weight, columns, ridge=1e-9)], CHANNELS)
    assert int(worth.argmin()) in (1, 3)
    assert float(worth.min()) < 1e-6


def test_sums_are_exact_in_any_order():
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn((4, 4), generator=draw, dtype=torch.float64) * 10.0**k for k in range(-6, 9, 3)]
    totals = []
    for order in itertools.permutations(parts):
        found = ExactSum((4, 4), torch.device("cpu"))
        for part in order:
            found.add(part)
        totals.append(found.total)
    assert all(torch.equal(total, totals[0]) for total in totals)
    assert torch.allclose(totals[0], torch.stack(parts).sum(0), rtol=1e-12)

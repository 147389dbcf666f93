"""States: zeros, merge words, what is refused."""

import pytest
import torch

from dist_prune.distributed.communicator import Communicator
from dist_prune.pruning.graph.groups import HookPoint
from dist_prune.pruning.hooks.statistics import Accumulator, State, Statistic, merge_

SITE = HookPoint("conv", "conv", 3, "conv", True)


class Everything(Statistic):
    """One state for each merge word."""

    def states(self, site):
        return {
            "count": State("sum", (site.width,)),
            "top": State("max", (site.width,), torch.float64),
            "low": State("min", (), torch.int64),
            "each": State("rows", (site.width,), torch.float32),
        }

    def update(self, site, tables, maps, ids, grads):
        tables["count"] += (maps > 0).sum(0)
        tables["top"].copy_(torch.maximum(tables["top"], maps.double().amax(0)))
        tables["low"].clamp_(max=int(ids.min()))
        tables["each"][ids] = maps


VALUES = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))


def tally_of(positions: list[int]) -> Accumulator:
    tally = Accumulator(Everything(), [SITE], len(VALUES), torch.device("cpu"))
    if positions:
        tally.update(SITE, VALUES[positions], torch.tensor(positions))
    return tally


def over_ranks(ranks: Communicator) -> dict:
    tally = tally_of(list(range(11))[ranks.rank :: ranks.world] if ranks.rank < 2 else [])  # rank 2 sees nothing
    if ranks.world == 3:
        tally = tally_of([[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10], []][ranks.rank])
    for (word, _), tables in tally.reduction_buckets().items():
        ranks.all_reduce(word, tables)
    return {key: table.tolist() for key, table in tally.state_dict().items()}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_real_ranks_merge_to_the_whole(world, pool):
    whole = {key: table.tolist() for key, table in tally_of(list(range(11))).state_dict().items()}
    assert all(found == whole for found in pool.run(world, over_ranks))


def volume(ranks: Communicator) -> dict:
    tally = tally_of([ranks.rank])
    for (word, _), tables in tally.reduction_buckets().items():
        ranks.all_reduce(word, tables)
    return ranks.volume


def test_one_collective_per_word_and_dtype(pool):
    for found in pool.run(2, volume):
        assert found == {"sum": (1, 3 * 8), "max": (1, 3 * 8), "min": (1, 8), "rows": (1, 11 * 3 * 4)}


def test_folding_locally_is_the_same():
    parts = [tally_of([0, 5]), tally_of([1, 2, 3, 4]), tally_of([6, 7, 8, 9, 10])]
    for part in parts[1:]:
        parts[0].merge(part)
    whole = tally_of(list(range(11))).state_dict()
    assert all(torch.equal(table, whole[key]) for key, table in parts[0].state_dict().items())


def test_float_sums_are_refused():
    with pytest.raises(ValueError, match="depends on the sharding"):
        State("sum", (3,), torch.float32)


@pytest.mark.parametrize("word", ["sum", "max", "min", "rows"])
def test_zero_is_the_identity(word):
    zero = State(word, (4,)).zero(2)
    table = torch.randint(-9, 9, zero.shape)
    merged = table.clone()
    merge_(word, merged, zero)
    assert torch.equal(merged, table)

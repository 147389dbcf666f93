"""Launch checks, lost ranks, and what one process may promise others."""

import pytest

from dist_prune.errors import PruneError
from dist_prune.runtime.collectives import Ranks
from dist_prune.runtime.machine import check_launch


def test_world_size_without_ranks():
    with pytest.raises(PruneError, match=r"WORLD_SIZE is 2 but .*accelerate launch --config_file launch/cpu_2\.yaml"):
        check_launch({"WORLD_SIZE": "2"})
    check_launch({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"})
    check_launch({})


def first_fails(ranks: Ranks) -> str:
    def act():
        raise PruneError("the disk is full")

    try:
        ranks.together(act)
    except PruneError as error:
        return str(error)
    return "no error"


def test_a_failure_of_the_first_rank_reaches_all(pool):
    assert pool.run(3, first_fails) == ["the disk is full"] * 3


def talk(ranks: Ranks) -> tuple:
    import torch

    said = ranks.gather(f"rank {ranks.rank}")
    table = torch.full((2,), ranks.rank)
    return said, ranks.total(1, ranks.rank), ranks.broadcast(table, owner=ranks.world - 1).tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_ranks_say(pool, world):
    for said, total, table in pool.run(world, talk):
        assert said == [f"rank {rank}" for rank in range(world)]
        assert total == [world, world * (world - 1) // 2]
        assert table == [world - 1] * 2

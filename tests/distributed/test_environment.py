"""Launch checks, lost ranks, and what one process may promise others."""

import socket

import pytest

from dist_prune.distributed.communicator import Communicator, join_all
from dist_prune.distributed.environment import check_launch
from dist_prune.distributed.rendezvous import check_interfaces
from dist_prune.errors import PruneError


def test_world_size_without_ranks():
    with pytest.raises(PruneError, match=r"WORLD_SIZE is 2 but .*--num_processes N dist_prune/run\.py"):
        check_launch({"WORLD_SIZE": "2"})
    check_launch({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"})
    check_launch({})


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is no number"),
        ({"RANK": "first"}, "RANK is 'first'"),
        ({"MASTER_PORT": "29500x"}, "MASTER_PORT is '29500x'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000, which is no port"),
        ({"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lol"}, "GLOO_SOCKET_IFNAME is 'lol'"),
    ],
)
def test_what_launchers_set_is_looked_at_before_anybody_waits(environment, said):
    with pytest.raises(PruneError, match=said):
        check_launch(environment)


@pytest.mark.parametrize(
    ("variable", "value", "gpus", "good"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", False, True),
        ("GLOO_SOCKET_IFNAME", "eth0,lo", False, True),
        ("GLOO_SOCKET_IFNAME", "eth0,ib7", False, False),
        ("GLOO_SOCKET_IFNAME", "eth", False, False),  # whole names
        ("TP_SOCKET_IFNAME", "eth1", False, False),
        ("NCCL_SOCKET_IFNAME", "eth", True, True),  # beginnings of names
        ("NCCL_SOCKET_IFNAME", "ib,eth", True, True),
        ("NCCL_SOCKET_IFNAME", "=eth", True, False),
        ("NCCL_SOCKET_IFNAME", "=eth0", True, True),
        ("NCCL_SOCKET_IFNAME", "ib", True, False),
        ("NCCL_SOCKET_IFNAME", "ib", False, True),  # nobody reads it
        ("NCCL_SOCKET_IFNAME", "^docker,lo", True, True),
        ("NCCL_SOCKET_IFNAME", "^eth,lo", True, False),
        ("GLOO_SOCKET_IFNAME", "", False, True),
    ],
)
def test_interfaces_that_are_not_there_are_named_with_their_variable(variable, value, gpus, good):
    if good:
        check_interfaces({variable: value}, ["lo", "eth0"], gpus)
        return
    with pytest.raises(PruneError, match=rf"{variable} is '.*', and .* has no such .*; it has eth0, lo.*unset"):
        check_interfaces({variable: value}, ["lo", "eth0"], gpus)


def test_a_port_that_another_program_has_is_named():
    """The real store, on a port where somebody listens."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with pytest.raises(
            PruneError, match=rf"MASTER_PORT is {port}, and on .* another program listens there already"
        ):
            join_all(environment, 5)


def first_fails(ranks: Communicator) -> str:
    def act():
        raise PruneError("the disk is full")

    try:
        ranks.run_on_main(act)
    except PruneError as error:
        return str(error)
    return "no error"


def test_a_failure_of_the_first_rank_reaches_all(pool):
    assert pool.run(3, first_fails) == ["the disk is full"] * 3


def talk(ranks: Communicator) -> tuple:
    import torch

    said = ranks.all_gather_object(f"rank {ranks.rank}")
    table = torch.full((2,), ranks.rank)
    return said, ranks.sum_ints(1, ranks.rank), ranks.broadcast(table, owner=ranks.world - 1).tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_ranks_say(pool, world):
    for said, total, table in pool.run(world, talk):
        assert said == [f"rank {rank}" for rank in range(world)]
        assert total == [world, world * (world - 1) // 2]
        assert table == [world - 1] * 2

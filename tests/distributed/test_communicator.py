"""The communicator of processes that nothing made a group."""

import warnings

import pytest

from dist_prune.distributed.communicator import Communicator


def test_processes_of_a_launcher_without_a_group_are_warned(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match=r"2 processes were started .*init_process_group"):
        assert Communicator.of().world == 1


@pytest.mark.parametrize("world", [None, "1", ""])
def test_a_process_of_its_own_is_not_warned(monkeypatch: pytest.MonkeyPatch, world: str | None):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Communicator.of().world == 1

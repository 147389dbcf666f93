"""The state of a long computation: read back by the same computation only, on all ranks or on none."""

from pathlib import Path

import pytest
import torch

from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.resumable_state import ResumableState, identity_of
from dist_prune.errors import PruneError

TENSORS = {"sums": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(7)}


def state(folder: Path, identity: str = "these", ranks: Communicator | None = None) -> ResumableState:
    return ResumableState(folder / "state.safetensors", identity, ranks or Communicator())


def test_what_was_saved_is_loaded(tmp_path):
    assert state(tmp_path).load() == ({}, {})
    state(tmp_path).save(TENSORS, done=4)
    tensors, meta = state(tmp_path).load()
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert meta["done"] == 4
    assert state(tmp_path, "other").load() == ({}, {})


def test_nothing_is_kept_without_a_file(tmp_path):
    nothing = ResumableState(None, "these", Communicator())
    nothing.save(TENSORS)
    assert nothing.load() == ({}, {})
    assert not list(tmp_path.iterdir())


def test_one_flipped_bit_is_damage_and_another_identity_is_none(tmp_path):
    said: list[str] = []
    state(tmp_path).save(TENSORS)
    assert state(tmp_path, "other").load(lambda: said.append("damaged")) == ({}, {})
    assert not said
    raw = bytearray((tmp_path / "state.safetensors").read_bytes())
    raw[-3] ^= 1
    (tmp_path / "state.safetensors").write_bytes(raw)
    assert state(tmp_path).load(lambda: said.append("damaged")) == ({}, {})
    assert said == ["damaged"]


def test_a_disk_that_refuses_is_a_sentence(tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(PruneError, match="could not write"):
        ResumableState(tmp_path / "folder/state.safetensors", "these", Communicator()).save(TENSORS)


def _load_where_one_rank_sees_no_file(ranks: Communicator, folder: str) -> tuple[list[str], list[str]]:
    shared = state(Path(folder), ranks=ranks)
    shared.save(TENSORS)
    together = sorted(shared.load()[0])
    own = Path(folder) / ("state.safetensors" if ranks.rank else "missing.safetensors")
    return together, sorted(ResumableState(own, "these", ranks).load()[0])


def test_all_ranks_load_it_or_none_does(pool, tmp_path):
    for together, apart in pool.run(2, _load_where_one_rank_sees_no_file, str(tmp_path)):
        assert together == sorted(TENSORS)
        assert apart == []


def test_an_identity_is_that_of_earlier_releases():
    assert identity_of("a", [1, 2]) == "3c6ccc60776b9c8c95fe6858b89b1da5778f548576c43e148c6378848f4887d2"

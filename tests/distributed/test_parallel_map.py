"""Jobs over ranks: a rank that is asked to stop does not leave the others waiting; records on real ranks."""

import pytest

from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.parallel_map import map_cached, map_once
from dist_prune.distributed.preemption import PreemptedError
from dist_prune.distributed.result_cache import ResultCache


def stops_at(job: int) -> int:
    if job == 3:
        raise PreemptedError("stopped by SIGTERM in a job")
    return job * job


def told(ranks: Communicator, last: int) -> str:
    try:
        return str(map_once(range(last), stops_at, ranks))
    except PreemptedError as error:
        return f"left: {error}"


def test_every_rank_leaves_when_one_job_was_stopped(pool):
    assert pool.run(2, told, 3) == ["[0, 1, 4]"] * 2
    assert pool.run(2, told, 6) == ["left: stopped by SIGTERM in a job"] * 2
    assert pool.run(3, told, 4) == ["left: stopped by SIGTERM in a job"] * 3


def kept(ranks: Communicator, place, jobs: int) -> tuple[list, int]:
    done = []

    def run(job: tuple[str, int]) -> list[int]:
        done.append(job)
        return [job[1], len(job[0])]

    found = map_cached([("a", i) for i in range(jobs)], run, ranks, ResultCache(place, "these", ranks))
    return found, len(done)


def test_a_record_grows_over_worlds(tmp_path, pool):
    file = tmp_path / "folder" / "record.jsonl"
    for world, jobs, new in ((2, 5, 5), (3, 9, 4), (1, 9, 0)):
        found = pool.run(world, kept, file, jobs)
        assert all(results == [[i, 1] for i in range(jobs)] for results, _ in found)
        assert sum(count for _, count in found) == new
    assert len(file.read_text().splitlines()) == 9
    with file.open("a") as out:
        out.write('{"job":["a",9],"of":"the')  # cut off by a crash
    assert kept(Communicator(), file, 10)[1] == 1
    assert kept(Communicator(), file, 10) == ([[i, 1] for i in range(10)], 0)


def test_a_record_that_cannot_be_written_is_an_error_on_every_rank(tmp_path):
    from dist_prune.errors import PruneError

    (tmp_path / "file").write_text("")
    with pytest.raises(PruneError, match="could not make"):
        kept(Communicator(), tmp_path / "file" / "record.jsonl", 2)

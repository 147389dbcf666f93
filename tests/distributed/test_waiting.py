"""Ranks that wait: for one that never comes, for one that hangs in the middle. Bounded, named, nothing lost."""

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from dist_prune.distributed import watchdog
from dist_prune.distributed.rendezvous import Rendezvous
from dist_prune.errors import PruneError
from tests.support.launch import PYTHON, SMALL, report, run, start

LONG = (
    *SMALL, "score.images=1347", "score.micro_batch=2", "score.save_every=5", "finetune.epochs=6",
    "finetune.save_every_steps=3", "cluster.timeout_s=20",
)  # fmt: skip


def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def place(rank: int, world: int, at: int) -> dict[str, str]:
    """What a launcher tells a rank; here nobody watches the ranks but the test."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(at),
    }  # fmt: skip


def two(folder: Path) -> list[subprocess.Popen[str]]:
    at = port()
    return [start(PYTHON, folder, *LONG, **place(rank, 2, at)) for rank in (0, 1)]


@pytest.mark.parametrize("came", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_of_two_ranks_only_one_starts(tmp_path, came):
    began = time.monotonic()
    code, output = run(PYTHON, tmp_path / "run", *SMALL, "cluster.join_timeout_s=5", **place(came, 2, at := port()))
    assert code == 2, output
    assert f"rank {1 - came} of 2 did not come within 5 s (cluster.join_timeout_s)" in output
    assert f"MASTER_PORT={at}" in output
    assert "Traceback" not in output
    assert "CPUAllocator" not in output and "Exception raised from" not in output, "no words from below"
    assert time.monotonic() - began < 60
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_who_is_missing_among_many(tmp_path):
    """Ranks 0, 2 and 3 of 20 came: the first missing ones are named, the rest counted."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 20)  # pyright: ignore[reportPrivateImportUsage]
    for rank in (2, 3):
        Rendezvous(store, rank, 20).write("here")

    with pytest.raises(PruneError) as caught:
        environment = {**place(0, 20, 1), "RANK": "0"}
        Rendezvous.join(environment, 0.5, lambda *_: store)
    assert str(caught.value).startswith(
        "ranks 1, 4, 5, 6, 7, 8, 9, 10 and 9 more of 20 did not come within 0.5 s (cluster.join_timeout_s). "
        f"Here: rank 0 (process {os.getpid()} on {socket.gethostname()}), rank 2 "
    )


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("[gloo/tcp/unbound_buffer.cc:84] Timed out waiting 20000ms for recv operation", "nobody answered for 20 s"),
        ("Application timeout caused pair closure", "nobody answered for as long as cluster.timeout_s"),
        (
            "[gloo/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1",
            "the connection was closed at the other end",
        ),
    ],
)
def test_what_gloo_says_of_lost_ranks_is_understood(said, reason):
    """The words of three real ends, in an exchange that torch itself called."""
    from dist_prune.distributed.communicator import Communicator, RankLostError, peer_failures

    with pytest.raises(RankLostError, match=reason), peer_failures(Communicator(1, 2)):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="shapes") as caught, peer_failures(Communicator(1, 2)):
        raise RuntimeError("shapes do not match")
    assert not isinstance(caught.value, RankLostError)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two ranks, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    for process in two(folder):
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sign", "hanging"), [("round_1/partial/observation_1.safetensors", 0), ("finetune_checkpoints/*.sha256", 1)]
)
def test_a_rank_that_hangs_is_named_and_nothing_is_lost(whole, tmp_path, hanging, sign):
    """SIGSTOP in scoring and in training, of the rank that keeps the roll and of the other."""
    folder = tmp_path / "run"
    ranks = two(folder)
    try:
        while not any(folder.glob(sign)):
            assert all(process.poll() is None for process in ranks)
            time.sleep(0.01)
        ranks[hanging].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        output, _ = ranks[1 - hanging].communicate(timeout=120)
        assert ranks[1 - hanging].returncode == 2, output
        assert 15 < time.monotonic() - began < 60, "the time-out is 20 s, then a few for the others' reports"
        assert "Traceback" not in output
        assert f"error on rank {1 - hanging}: rank {1 - hanging} of 2 waited for the others" in output
        # gloo says the time only in the thread that waited first
        assert re.search(r"nobody answered for (20 s \(cluster.timeout_s\)|as long as cluster.timeout_s)", output), (
            output
        )
        named = f"rank 1 (process {ranks[1].pid} on {socket.gethostname()})" if hanging else "rank 0 or its launcher"
        assert f"No word from {named}" in output
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    for process in two(folder):
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    assert report(folder)["plan"]["fingerprint"] == report(whole)["plan"]["fingerprint"]
    assert report(folder)["finetuned"]["loss"] == report(whole)["finetuned"]["loss"]
    assert any(event["event"] == "resumed" for event in report(folder)["events"])


def test_a_taken_port_and_an_interface_that_is_not_there_end_a_start(tmp_path):
    """The whole program, as a launcher that nobody watches would start it: a sentence each, in the first seconds."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        at = other.getsockname()[1]
        code, output = run(PYTHON, tmp_path / "run", *SMALL, **place(0, 2, at))
    assert code == 2, output
    assert f"error on rank 0: MASTER_PORT is {at}, and on " in output and "another program listens there" in output
    assert "Traceback" not in output
    code, output = run(PYTHON, tmp_path / "run", *SMALL, **place(0, 2, port()), GLOO_SOCKET_IFNAME="nowhere0")
    assert code == 2, output
    assert "error on rank 0: GLOO_SOCKET_IFNAME is 'nowhere0', and " in output
    assert "Traceback" not in output


def meeting(folder: Path) -> tuple[socket.socket, int, object]:
    """A place where somebody answers, and the store of the ranks that meet there."""
    import torch.distributed as dist

    server = socket.create_server(("127.0.0.1", 0))
    return server, server.getsockname()[1], dist.FileStore(str(folder / "store"), 2)  # pyright: ignore[reportPrivateImportUsage]


def test_a_rank_of_an_earlier_launch_does_not_join_the_next(tmp_path):

    server, at, store = meeting(tmp_path)
    with server:
        Rendezvous(store, 0, 2, "launch new").register()
        with pytest.raises(PruneError, match=r"belongs to another launch \(launch old\) than the first rank"):
            Rendezvous.join({**place(1, 2, at), "DIST_PRUNE_LAUNCH": "old"}, 20, lambda *_: store)
        with pytest.raises(PruneError, match="belongs to another launch"):
            Rendezvous.join(place(1, 2, at), 20, lambda *_: store)
        found = Rendezvous.join({**place(1, 2, at), "DIST_PRUNE_LAUNCH": "new"}, 20, lambda *_: store)
    assert found is not None
    assert found.describe_rank(1).startswith(f"rank 1 (process {os.getpid()} ")


def test_two_processes_of_one_number_are_told_apart(tmp_path):
    """Where nothing names the launch, at least nobody takes another one's place in silence."""

    server, at, store = meeting(tmp_path)
    with server:
        Rendezvous(store, 0, 2).register()
        store.set("dist_prune///here/1", '{"host": "elsewhere", "pid": 7}')  # type: ignore[attr-defined]
        with pytest.raises(PruneError, match=r"is here twice: rank 1 \(process 7 on elsewhere\) came first"):
            Rendezvous.join(place(1, 2, at), 5, lambda *_: store)


def test_torchrun_starts_its_processes_again_on_the_same_store(tmp_path):
    """Its store outlives them: the second attempt does not read the first one's roll."""
    server, at, store = meeting(tmp_path)
    more = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x"}
    for attempt in ("0", "1"):
        environment = {**place(0, 2, at), **more, "TORCHELASTIC_RESTART_COUNT": attempt}
        name = watchdog.launch_id(environment)
        if attempt == "0":
            Rendezvous(store, 1, 2, name, attempt).register()
            assert Rendezvous.join(environment, 20, lambda *_: store) is not None
        else:
            with pytest.raises(PruneError, match="rank 1 of 2 did not come"):
                Rendezvous.join(environment, 0.5, lambda *_: store)
    server.close()


def test_what_a_launch_is_called():
    one = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}
    assert watchdog.launch_id({}) == ""
    assert watchdog.launch_id(one) == "", "two machines, and nothing that both know"
    assert watchdog.launch_id({**one, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}) == "job 7.2"
    assert watchdog.launch_id({**one, "TORCHELASTIC_RUN_ID": "abc", "DIST_PRUNE_LAUNCH": "x"}) == "launch x, run abc"
    here = watchdog.launch_id({**one, "WORLD_SIZE": "2"})
    assert here == watchdog.launch_id({**one, "WORLD_SIZE": "2"})
    assert here.startswith(f"launcher {os.getppid()} since ")

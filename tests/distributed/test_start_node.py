"""The processes of one node under a scheduler: exit codes, the request to stop, two nodes on one machine."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_prune.distributed.start_node import exit_code, torchrun
from dist_prune.errors import PruneError
from tests.support.launch import ROOT, SMALL, environment, report, wait_for

OWN = {"rank": 0, "cause": True}
LOST = {"rank": 1, "cause": False, "code": 2}


@pytest.mark.parametrize(
    ("launcher", "own", "others", "asked", "code"),
    [
        (0, [], [], False, 0),
        (1, [{**OWN, "code": 75}], [], True, 75),
        (1, [{**OWN, "code": 75}, LOST], [], False, 75),
        (1, [{**OWN, "code": 2}], [], False, 2),
        (1, [{**OWN, "code": 2}], [], True, 2),
        (1, [{**OWN, "code": 3}], [], False, 3),
        (1, [{**OWN, "code": 1}, LOST], [], False, 1),
        (1, [], [], False, 1),  # the kernel killed a rank
        (-15, [], [], True, 75),  # asked before there were ranks
        (1, [LOST], [], False, 75),  # another node is gone
        (1, [LOST], [{"code": 2}], False, 2),  # another node's rank had an error that would repeat
        (1, [LOST], [{"code": 1}], False, 1),
    ],
)
def test_the_code_tells_whether_the_same_command_goes_on(launcher, own, others, asked, code):
    assert exit_code(launcher, own, others, asked) == code


def test_the_node_s_place_comes_from_the_scheduler():
    words = ["--processes", "2", "--", "--recipe", "r", "--run-dir", "/runs/x", "a=--b"]
    kubeflow = {"PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_MASTER_ADDR": "first"}
    sky = {"SKYPILOT_NUM_NODES": "4", "SKYPILOT_NODE_RANK": "3", "SKYPILOT_NODE_IPS": "first\nsecond\n"}
    for variables in (kubeflow | {"PET_MASTER_PORT": "29400"}, sky | {"MASTER_PORT": "29400"}):
        command, run_dir = torchrun(words, variables)
        assert run_dir == Path("/runs/x")
        assert shlex.join(command[1:]) == (
            "-m torch.distributed.run --nnodes 4 --node_rank 3 --nproc_per_node 2 --master_addr first "
            "--master_port 29400 --rdzv_conf timeout=600 --max_restarts 0 "
            "-m dist_prune.run --recipe r --run-dir /runs/x a=--b"
        )
    alone = shlex.join(torchrun(["--", "--recipe", "r"], {})[0])
    assert "--nnodes 1 --node_rank 0 --nproc_per_node 1 --master_addr 127.0.0.1 --master_port 29500" in alone
    with pytest.raises(PruneError, match="2 nodes, but this node's rank .* is not known"):
        torchrun(["--nodes", "2", "--", "--recipe", "r"], {"MASTER_ADDR": "first"})
    with pytest.raises(PruneError, match="first node's address .* is not known"):
        torchrun(["--nodes", "2", "--", "--recipe", "r"], {"NODE_RANK": "0"})


def start(port: int, *words: str, **more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "dist_prune.distributed.start_node", "--port", str(port), *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT), **more), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def port() -> int:
    return 21000 + os.getpid() % 8000


@pytest.mark.slow
def test_two_nodes_are_preempted_and_go_on(tmp_path):
    """SIGTERM to one of them, as Kubernetes sends it: all ranks save, both end with 75, the same commands finish."""
    folder = tmp_path / "run"
    words = ("--nodes", "2", "--", "--recipe", "quickstart", "--run-dir", str(folder), *SMALL, "train.epochs=30")

    def both() -> list["subprocess.Popen[str]"]:
        return [start(port(), *words, MASTER_ADDR="127.0.0.1", JOB_COMPLETION_INDEX=str(node)) for node in (0, 1)]

    nodes = both()
    wait_for(nodes[0], lambda: any(folder.glob("train_checkpoints/*.sha256")), 180)
    nodes[1].send_signal(signal.SIGTERM)
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [75, 75], said
    assert "stopped by SIGUSR1 in train" in said[1]
    nodes = both()
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "resumes after epoch" in said[0]
    assert report(folder)["world_size"] == 2


@pytest.mark.slow
def test_an_error_that_would_repeat_has_its_own_code(tmp_path):
    node = start(port(), "--", "--recipe", "quickstart", "--run-dir", str(tmp_path / "run"), "score.imagse=3")
    said = node.communicate(timeout=120)[0]
    assert node.returncode == 2, said
    assert "Did you mean" in said

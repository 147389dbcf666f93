"""A real SLURM of two nodes on loopback: munged, one slurmctld, two slurmd, in one folder, stopped at the end."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.launch import environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
PATIENCE_S = 300
CONFIG = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin={tasks}
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=15
SlurmdTimeout=20
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


@dataclass
class Cluster:
    """The cluster, as a user with a shell on its head node has it."""

    folder: Path
    daemons: dict[str, int]

    def do(self, *words: str, **more: str) -> str:
        """What a command prints; its failure fails the test."""
        done = subprocess.run(
            words, env=self.environment(**more), capture_output=True, text=True, check=False, timeout=120,
            cwd=self.folder,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def environment(self, **more: str) -> dict[str, str]:
        """The nodes' names are known to SLURM alone, so ranks are told the address; everything is on loopback."""
        return environment(
            SLURM_CONF=str(self.folder / "slurm.conf"), MASTER_ADDR="127.0.0.1", DIST_PRUNE_INTERFACE="lo", **more
        )

    def wait(self, condition: Any, what: str, seconds: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s until {what}\n{self.do('squeue')}\n{self.said()}"
            time.sleep(0.05)

    def finish(self, job: str) -> None:
        """Wait until a job and all its tasks have left the queue."""
        self.wait(lambda: not self.queue(job), f"job {job} is finished")

    def queue(self, job: str) -> str:
        done = subprocess.run(
            ["squeue", "-h", "-j", job], env=self.environment(), capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    def said(self) -> str:
        """The end of what every job printed."""
        return "\n".join(f"== {file.name}\n{file.read_text()[-3000:]}" for file in sorted(self.folder.glob("*.out")))


def _install() -> None:
    """Debian's packages where that is allowed; else skip, or fail where the tests must run."""
    if all(map(_program, PROGRAMS)):
        return
    reason = "SLURM is not installed, and only root with apt-get could install it here"
    if os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, "check": False, "capture_output": True}
        subprocess.run(["apt-get", "update", "-qq"], **quiet)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "slurm-wlm", "munge"], **quiet)
        reason = "apt-get could not install slurm-wlm and munge"
    if all(map(_program, PROGRAMS)) and os.geteuid() == 0:
        return
    if os.environ.get("DIST_PRUNE_MUST_RUN"):
        pytest.fail(reason)
    pytest.skip(reason)


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_:
        found = [open_.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


def _pid(file: Path) -> int:
    for _ in range(200):
        with contextlib.suppress(OSError, ValueError):
            return int(file.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{file} did not appear; {[log.read_text()[-1500:] for log in file.parent.glob('*.log')]}")


@contextlib.contextmanager
def cluster(folder: Path, tasks: str = "task/none") -> Iterator[Cluster]:
    """Start everything, wait until both nodes are idle, stop everything that was started; ``tasks``: TaskPlugin."""
    _install()
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=_free_ports(3), tasks=tasks))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    found = Cluster(folder, {})
    named = [f"--{what}={folder}/munge.{end}" for what, end in (
        ("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"),
    )]  # fmt: skip
    try:
        for name, command in (
            ("munge", ["munged", "--force", *named]), ("slurmctld", ["slurmctld"]),
            ("n1", ["slurmd", "-N", "n1"]), ("n2", ["slurmd", "-N", "n2"]),
        ):  # fmt: skip
            found.do(str(_program(command[0])), *command[1:])
            found.daemons[name] = _pid(folder / f"{name}.pid")
        found.wait(lambda: found.do("sinfo", "-h", "-o", "%D %t") == "2 idle", "both nodes are idle", 60)
        yield found
    finally:
        _stop(found)


def _stop(found: Cluster) -> None:
    with contextlib.suppress(Exception):
        found.do("scancel", "--me", "--signal=KILL")
        found.do("scancel", "--me")
        found.wait(lambda: not found.do("squeue", "-h"), "the queue is empty", 30)
    for name in ("n2", "n1", "slurmctld", "munge"):
        with contextlib.suppress(KeyError, psutil.NoSuchProcess):
            process = psutil.Process(found.daemons[name])
            process.terminate()
            try:
                process.wait(15)
            except psutil.TimeoutExpired:
                process.kill()

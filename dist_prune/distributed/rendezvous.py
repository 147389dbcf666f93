"""The rendezvous of a run's ranks: each registers its host and process, so that a missing rank can be named.

This module uses a key-value store and no collective.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from dist_prune.distributed import watchdog
from dist_prune.errors import PruneError, abbreviate, nearest

T = TypeVar("T")
LOOK_S = 0.2  # seconds between two looks into the store
_MEETING = (
    "All ranks meet at MASTER_ADDR={address}, MASTER_PORT={port}: start the missing ones, look into their logs, and "
    "see that this address can be reached from their machines (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME name the "
    "interface). Nothing was computed yet and nothing is lost."
)


@dataclass
class Rendezvous:
    """The ranks of a run in a key-value store: each rank registers itself before any collective.

    The store is the one through which process groups are made (torchrun's, else that of rank 0).

    Attributes:
        store: a torch.distributed store.
        rank: number of this process.
        world: number of processes.
        launch: id of this launch, see ``watchdog.launch_id``.
        attempt: torchrun's count of restarts: its store outlives the processes that it starts again.
    """

    store: Any
    rank: int
    world: int
    launch: str = ""
    attempt: str = ""

    @classmethod
    def join(
        cls, environment: Mapping[str, str], patience_s: float, store: Callable[[str, int, int, bool], Any]
    ) -> "Rendezvous | None":
        """Register this rank and wait until all ranks have registered; every rank calls it.

        Args:
            environment: the environment's variables, with the launcher's.
            patience_s: seconds for which a rank waits.
            store: opens the store: (address, port, number of ranks, whether this process serves it) -> store.

        Returns:
            The rendezvous, or None for a single process or without MASTER_ADDR and MASTER_PORT.

        Raises:
            PruneError: ranks did not come within ``patience_s`` seconds (it names them), this process belongs to
                another launch than rank 0, or its rank is taken.
            PreemptedError: asked to stop while it waited.
        """
        rank, world = int(environment.get("RANK") or 0), int(environment.get("WORLD_SIZE") or 1)
        address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
        if world == 1 or not address or not port:
            return None
        hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        deadline = time.monotonic() + patience_s
        if rank or hosted:
            _wait_for_address(address, int(port), deadline, rank, world, patience_s)
        meeting = _MEETING.format(address=address, port=port)

        def meet() -> tuple["Rendezvous", list[int], list[str]]:
            attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "") if hosted else ""
            launch = watchdog.launch_id(environment)
            rendezvous = cls(store(address, int(port), world, not rank and not hosted), rank, world, launch, attempt)
            rendezvous.register()
            absent = rendezvous.absent("here", deadline)
            return (
                rendezvous,
                absent,
                [rendezvous.describe_rank(n) for n in range(world) if n not in absent] if absent else [],
            )

        try:
            rendezvous, absent, present = _within(deadline - time.monotonic() + 10, meet)
        except (RuntimeError, TimeoutError) as error:
            port_in_use_error(error, port)
            reason = str(error).splitlines()[0]
            raise PruneError(
                f"rank {rank} of {world} came, but lost rank 0 or its launcher: {reason}. {meeting}"
            ) from error
        if absent:
            names = f"{'ranks' if len(absent) > 1 else 'rank'} {abbreviate(list(map(str, absent)))} of {world}"
            within = f"{patience_s:g} s (cluster.join_timeout_s)"
            raise PruneError(f"{names} did not come within {within}. Here: {abbreviate(present)}. {meeting}")
        return rendezvous

    def missing(self, topic: str, patience_s: float) -> list[str]:
        """Write an entry for a topic and find the ranks that do not within some time.

        Args:
            topic: its name, not used before in this run.
            patience_s: seconds for which the others are waited for.

        Returns:
            Descriptions of the ranks that wrote nothing; of rank 0 alone if the store does not answer.
        """

        def names() -> list[str]:
            self.write(topic)
            return [self.describe_rank(rank) for rank in self.absent(topic, time.monotonic() + patience_s)]

        try:
            return _within(patience_s + 2, names)
        except (RuntimeError, TimeoutError):
            return ["rank 0 or its launcher, which keep the list of ranks"]

    def register(self) -> None:
        """Register this rank.

        Raises:
            PruneError: another process has registered under this rank.
        """
        if not self.rank:
            self.store.set("dist_prune/launch", json.dumps(self.launch))
        note = self._note()
        registered = self.store.compare_set(self._key(f"here/{self.rank}"), "", note).decode()
        if registered != note:
            raise PruneError(
                f"rank {self.rank} of {self.world} is here twice: {self.describe_rank(self.rank)} came first, this is "
                f"process {os.getpid()} on {socket.gethostname()}. One of them is left over from an earlier launch: "
                "end it and start again. DIST_PRUNE_LAUNCH, set to another value at each launch, keeps launches apart"
            )
        self._count("here")

    def write(self, topic: str) -> None:
        """Write this rank's host and process for a topic."""
        self.store.set(self._key(f"{topic}/{self.rank}"), self._note())
        self._count(topic)

    def _note(self) -> str:
        return json.dumps({"host": socket.gethostname(), "pid": os.getpid()})

    def _count(self, topic: str) -> None:
        if self.store.add(self._key(topic), 1) == self.world:
            self.store.set(self._key(f"{topic}/all"), "")

    def _key(self, topic: str) -> str:
        return f"dist_prune/{self.launch}/{self.attempt}/{topic}"

    def absent(self, topic: str, deadline: float) -> list[int]:
        """Wait until all ranks have written for a topic.

        Args:
            topic: its name.
            deadline: time of ``time.monotonic()`` at which the waiting ends.

        Returns:
            The ranks that have written nothing by then.

        Raises:
            PruneError: rank 0 belongs to another launch (topic ``here`` only).
            PreemptedError: asked to stop while it waited (topic ``here`` only).
        """
        while not self.store.check([self._key(f"{topic}/all")]):
            if topic == "here":
                self._check_launch()
                _check_preempted(self.rank, self.world)
            if time.monotonic() > deadline:
                return [n for n in range(self.world) if not self.store.check([self._key(f"{topic}/{n}")])]
            time.sleep(LOOK_S)
        return []

    def _check_launch(self) -> None:
        if not self.rank or not self.store.check(["dist_prune/launch"]):
            return
        first_launch = json.loads(self.store.get("dist_prune/launch"))
        if first_launch != self.launch:
            raise PruneError(
                f"rank {self.rank} of {self.world} (process {os.getpid()} on {socket.gethostname()}) belongs to "
                f"another launch ({self.launch or 'without a name'}) than the first rank "
                f"({first_launch or 'no name'}): it was left over, or two launches use one MASTER_PORT. It leaves; the "
                "other launch continues without it"
            )

    def describe_rank(self, rank: int) -> str:
        """A rank with its process id and host, for messages."""
        note = json.loads(self.store.get(self._key(f"here/{rank}")))
        return f"rank {rank} (process {note['pid']} on {note['host']})"


def _wait_for_address(address: str, port: int, deadline: float, rank: int, world: int, patience_s: float) -> None:
    """Wait until rank 0 or its launcher accepts connections at the address where the ranks meet."""
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                within = f"{patience_s:g} s (cluster.join_timeout_s)"
                seen = f"rank {rank} finds nobody at {address}:{port} ({error.strerror or error})"
                meeting = _MEETING.format(address=address, port=port)
                raise PruneError(f"rank 0 of {world} did not come within {within}: {seen}. {meeting}") from error
            _check_preempted(rank, world)
            time.sleep(LOOK_S)


def _check_preempted(rank: int, world: int) -> None:
    if watchdog.stop_requested():
        raise watchdog.PreemptedError(
            f"stopped by {watchdog.stop_reason()} while rank {rank} of {world} waited for the others; nothing was "
            f"begun, and the same command starts anew (exit code {watchdog.EXIT_CODE})"
        )


def _within(seconds: float, function: Callable[[], T]) -> T:
    """Call a function in a thread and return its result; TimeoutError after ``seconds``.

    A store never answers if its server hangs, whatever the store's own time-out is.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer for {seconds:.0f} s") from None


def port_in_use_error(error: Exception, port: str | None) -> None:
    """Turn an error of torch about a port in use into one for the user; other errors pass.

    Args:
        error: raised when a process group or store was opened.
        port: MASTER_PORT.

    Raises:
        PruneError: the error says that another program listens on the port; it names a free one.
    """
    text = str(error)
    if not any(word in text for word in ("EADDRINUSE", "already in use")):
        return
    with socket.socket() as probe:
        probe.bind(("", 0))
        free = probe.getsockname()[1]
    raise PruneError(
        f"MASTER_PORT is {port}, and on {socket.gethostname()} another program listens there already (another run?). "
        f"Take a free one for all ranks: MASTER_PORT={free}, accelerate launch --main_process_port {free}, torchrun "
        f"--master_port {free} (0 lets a launcher on one machine choose). Nothing was computed yet and nothing is lost."
    ) from error


def check_interfaces(environment: Mapping[str, str], names: Sequence[str], gpus: bool) -> None:
    """Check the variables that name network interfaces.

    Args:
        environment: the environment's variables. GLOO_SOCKET_IFNAME takes names, TP_SOCKET_IFNAME one name,
            NCCL_SOCKET_IFNAME prefixes of names, or whole names after =, or names to leave out after ^.
        names: names of this machine's interfaces.
        gpus: whether ranks communicate through NCCL.

    Raises:
        PruneError: a variable names an interface that this machine does not have.
    """

    def missing(variable: str, wanted: list[str]) -> None:
        raise PruneError(
            f"{variable} is {environment[variable]!r}, and {socket.gethostname()} has no such network interface; it "
            f"has {', '.join(sorted(names))}.{nearest(wanted[0], names)} Name the one that reaches the other machines, "
            "or unset it (slurm/run.sbatch sets it from DIST_PRUNE_INTERFACE)"
        )

    for variable in ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
        wanted = [name.strip() for name in environment.get(variable, "").split(",") if name.strip()]
        absent = [name for name in wanted if name not in names]
        if absent:
            missing(variable, absent)
    nccl_value = environment.get("NCCL_SOCKET_IFNAME", "").strip()
    if not gpus or not nccl_value:
        return
    excluding = nccl_value.startswith("^")
    exact = nccl_value.lstrip("^").startswith("=")
    wanted = [name.strip() for name in nccl_value.lstrip("^=").split(",") if name.strip()]
    matching = [
        name for name in names if any(name == prefix if exact else name.startswith(prefix) for prefix in wanted)
    ]
    if wanted and (not matching if not excluding else len(matching) == len(names)):
        missing("NCCL_SOCKET_IFNAME", wanted)

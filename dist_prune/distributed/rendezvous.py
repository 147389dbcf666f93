"""The roll: who takes part in a run, by name, so that whoever is missing can be named. Knows no collective."""

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
LOOK_S = 0.2  # between two looks at the roll
_MEETING = (
    "All ranks meet at MASTER_ADDR={place}, MASTER_PORT={port}: start the missing ones, look into their logs, and see "
    "that this place can be reached from their machines (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME name the interface). "
    "Nothing was computed yet and nothing is lost."
)


@dataclass
class Rendezvous:
    """Who takes part, by name: each rank writes itself down where all can read it, before any collective.

    It lies in the store through which process groups are made (torchrun's, else the first rank's).
    """

    store: Any
    rank: int
    world: int
    launch: str = ""  # what this launch is called, see watch.launch
    attempt: str = ""  # torchrun's store outlives the processes that it starts again

    @classmethod
    def join(
        cls, environment: Mapping[str, str], patience_s: float, store: Callable[[str, int, int, bool], Any]
    ) -> "Rendezvous | None":
        """Wait until all ranks are here; None for one process, and where no launcher said where to meet.

        Args:
            environment: a launcher's variables.
            patience_s: how long.
            store: opens the store by address, port, number of ranks, and whether it is served here.

        Raises:
            PruneError: someone did not come within ``patience_s`` seconds; it says who. Or this process is of another
                launch than the first rank, or its number is taken.
            PreemptedError: asked to stop while it waited.
        """
        rank, world = int(environment.get("RANK") or 0), int(environment.get("WORLD_SIZE") or 1)
        place, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
        if world == 1 or not place or not port:
            return None
        hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        deadline = time.monotonic() + patience_s
        if rank or hosted:
            _reach(place, int(port), deadline, rank, world, patience_s)
        meeting = _MEETING.format(place=place, port=port)

        def come() -> tuple["Rendezvous", list[int], list[str]]:
            attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "") if hosted else ""
            launch = watchdog.launch_id(environment)
            found = cls(store(place, int(port), world, not rank and not hosted), rank, world, launch, attempt)
            found.register()
            absent = found.absent("here", deadline)
            return found, absent, [found.describe_rank(n) for n in range(world) if n not in absent] if absent else []

        try:
            found, absent, here = _within(deadline - time.monotonic() + 10, come)
        except (RuntimeError, TimeoutError) as error:
            port_in_use_error(error, port)
            reason = str(error).splitlines()[0]
            raise PruneError(
                f"rank {rank} of {world} came, but lost rank 0 or its launcher: {reason}. {meeting}"
            ) from error
        if absent:
            names = f"{'ranks' if len(absent) > 1 else 'rank'} {abbreviate(list(map(str, absent)))} of {world}"
            within = f"{patience_s:g} s (cluster.join_timeout_s)"
            raise PruneError(f"{names} did not come within {within}. Here: {abbreviate(here)}. {meeting}")
        return found

    def missing(self, word: str, patience_s: float) -> list[str]:
        """Write under ``word`` and name the ranks that do not within ``patience_s`` seconds."""

        def names() -> list[str]:
            self.write(word)
            return [self.describe_rank(rank) for rank in self.absent(word, time.monotonic() + patience_s)]

        try:
            return _within(patience_s + 2, names)
        except (RuntimeError, TimeoutError):
            return ["rank 0 or its launcher, which keep the roll"]

    def register(self) -> None:
        """Write this rank down; PruneError where another process has its number."""
        if not self.rank:
            self.store.set("dist_prune/launch", json.dumps(self.launch))
        mine = self._note()
        there = self.store.compare_set(self._key(f"here/{self.rank}"), "", mine).decode()
        if there != mine:
            raise PruneError(
                f"rank {self.rank} of {self.world} is here twice: {self.describe_rank(self.rank)} came first, this is "
                f"process {os.getpid()} on {socket.gethostname()}. One of them is left over from an earlier launch: "
                "end it and start again. DIST_PRUNE_LAUNCH, set to another value at each launch, keeps launches apart"
            )
        self._count("here")

    def write(self, word: str) -> None:
        """This rank's line under ``word``."""
        self.store.set(self._key(f"{word}/{self.rank}"), self._note())
        self._count(word)

    def _note(self) -> str:
        return json.dumps({"host": socket.gethostname(), "pid": os.getpid()})

    def _count(self, word: str) -> None:
        if self.store.add(self._key(word), 1) == self.world:
            self.store.set(self._key(f"{word}/all"), "")

    def _key(self, word: str) -> str:
        return f"dist_prune/{self.launch}/{self.attempt}/{word}"

    def absent(self, word: str, deadline: float) -> list[int]:
        """The ranks that have written nothing under ``word`` when all have or the time is over.

        Raises:
            PruneError: the first rank is of another launch.
            PreemptedError: asked to stop, before anything was begun.
        """
        while not self.store.check([self._key(f"{word}/all")]):
            if word == "here":
                self._same_launch()
                _heed(self.rank, self.world)
            if time.monotonic() > deadline:
                return [n for n in range(self.world) if not self.store.check([self._key(f"{word}/{n}")])]
            time.sleep(LOOK_S)
        return []

    def _same_launch(self) -> None:
        if not self.rank or not self.store.check(["dist_prune/launch"]):
            return
        there = json.loads(self.store.get("dist_prune/launch"))
        if there != self.launch:
            raise PruneError(
                f"rank {self.rank} of {self.world} (process {os.getpid()} on {socket.gethostname()}) belongs to "
                f"another launch ({self.launch or 'without a name'}) than the first rank ({there or 'no name'}): "
                "it was left over, or two launches use one MASTER_PORT. It leaves; the other launch goes on without it"
            )

    def describe_rank(self, rank: int) -> str:
        """A rank, its process and its machine."""
        note = json.loads(self.store.get(self._key(f"here/{rank}")))
        return f"rank {rank} (process {note['pid']} on {note['host']})"


def _reach(place: str, port: int, deadline: float, rank: int, world: int, patience_s: float) -> None:
    """Wait until somebody answers where the ranks meet: the first rank, or its launcher."""
    while True:
        try:
            socket.create_connection((place, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                within = f"{patience_s:g} s (cluster.join_timeout_s)"
                seen = f"rank {rank} finds nobody at {place}:{port} ({error.strerror or error})"
                meeting = _MEETING.format(place=place, port=port)
                raise PruneError(f"rank 0 of {world} did not come within {within}: {seen}. {meeting}") from error
            _heed(rank, world)
            time.sleep(LOOK_S)


def _heed(rank: int, world: int) -> None:
    if watchdog.stop_requested():
        raise watchdog.PreemptedError(
            f"stopped by {watchdog.stop_reason()} while rank {rank} of {world} waited for the others; nothing was "
            f"begun, and the same command starts anew (exit code {watchdog.EXIT_CODE})"
        )


def _within(seconds: float, act: Callable[[], T]) -> T:
    """What ``act`` returns; TimeoutError after ``seconds``. A store whose keeper hangs answers never, whatever its
    time-out says."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(act())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer for {seconds:.0f} s") from None


def port_in_use_error(error: Exception, port: str | None) -> None:
    """PruneError where an error says that another program listens on the port where the ranks would meet."""
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
    """PruneError where a variable names a network interface that this machine does not have.

    Args:
        environment: GLOO_SOCKET_IFNAME takes names, TP_SOCKET_IFNAME one, NCCL_SOCKET_IFNAME beginnings of names, or
            with = whole names, with ^ names to leave out.
        names: of this machine's interfaces.
        gpus: whether ranks talk through NCCL.
    """

    def missing(variable: str, asked: list[str]) -> None:
        raise PruneError(
            f"{variable} is {environment[variable]!r}, and {socket.gethostname()} has no such network interface; it "
            f"has {', '.join(sorted(names))}.{nearest(asked[0], names)} Name the one that reaches the other machines, "
            "or unset it (slurm/run.sbatch sets it from DIST_PRUNE_INTERFACE)"
        )

    for variable in ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
        asked = [name.strip() for name in environment.get(variable, "").split(",") if name.strip()]
        absent = [name for name in asked if name not in names]
        if absent:
            missing(variable, absent)
    given = environment.get("NCCL_SOCKET_IFNAME", "").strip()
    if not gpus or not given:
        return
    without, whole = given.startswith("^"), given.lstrip("^").startswith("=")
    asked = [name.strip() for name in given.lstrip("^=").split(",") if name.strip()]
    fits = [name for name in names if any(name == one if whole else name.startswith(one) for one in asked)]
    if asked and (not fits if not without else len(fits) == len(names)):
        missing("NCCL_SOCKET_IFNAME", asked)

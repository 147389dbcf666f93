"""A thread that notices signals, the launcher's end and standstills while the main thread is busy.

The main thread may wait in a collective, in an import or at the rendezvous, where no Python signal handler runs. This
module does not import torch, so that the thread runs while torch is imported.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from dist_prune.errors import PruneError

EXIT_CODE = 75  # sysexits' EX_TEMPFAIL: nothing is wrong, start the same command again
INTERRUPTED_CODE = 128 + signal.SIGINT
GRACE_S = 30  # seconds, as long as torchrun waits between SIGTERM and SIGKILL
ORPHAN_S = (
    5.0  # seconds for a run without its launcher: enough to save a small network, too few to meet the next launch
)
LOOK_S = 0.5  # seconds between two looks
STILL_S = 5.0  # seconds; a thread that wakes so much later than LOOK_S was not running in between
PRESS_S = 1.0  # seconds; one Ctrl-C arrives twice: from the terminal and from torchrun, which forwards it
OWNER = "DIST_PRUNE_OWNER"  # variable: a program with this process id starts runs and stops them with itself
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # variables that only torchrun and accelerate set

received: list[int] = []  # signals that ask this process to stop, in order
_watch: "Watchdog | None" = None


class PreemptedError(PruneError):
    """The run was asked to stop and has saved its state; the same command resumes there. Exit code ``EXIT_CODE``."""

    code = EXIT_CODE


class Watchdog:
    """The watching thread and its observations. Times are seconds of ``time.monotonic()``.

    Attributes:
        parent: process id of the launcher, or None if no launcher started this process (a run outlives its shell).
        standstills: (seconds for which this process did not run, time at which that ended), one for each standstill.
        orphaned_at: time at which the launcher was found to have ended, or 0.
    """

    def __init__(self, parent: int | None):
        self.parent, self.orphaned_at = parent, 0.0
        self.standstills: list[tuple[float, float]] = []
        self._presses: list[float] = []
        self._out, self._in = socket.socketpair()
        self._out.setblocking(False)
        self._in.setblocking(False)

    def begin(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def install_wakeup(self) -> None:
        """Let signals wake the thread the moment they arrive; called in the main thread."""
        signal.set_wakeup_fd(self._out.fileno(), warn_on_full_buffer=False)

    def _run(self) -> None:
        while True:
            before = time.monotonic()
            ready, _, _ = select.select([self._in], [], [], LOOK_S)
            now = time.monotonic()
            if now - before - LOOK_S > STILL_S:
                self.standstills.append((now - before - LOOK_S, now))
            if ready:
                with contextlib.suppress(OSError):
                    for number in self._in.recv(4096):
                        self._handle_signal(number, now)
            self._check_launcher(now)

    def _handle_signal(self, number: int, now: float) -> None:
        if number != signal.SIGINT:
            return
        if self._presses and now - self._presses[0] > PRESS_S:
            _end("interrupted twice: left at once, without saving", INTERRUPTED_CODE)
        self._presses.append(now)

    def _check_launcher(self, now: float) -> None:
        if self.parent is None or os.getppid() == self.parent:
            return
        self.orphaned_at = self.orphaned_at or now
        if now - self.orphaned_at > (GRACE_S if received else ORPHAN_S):
            _end(f"the launcher (process {self.parent}) is gone; what was saved is intact", EXIT_CODE)


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Start the watchdog; further calls do nothing. The first lines of a program call it, before long imports.

    Args:
        environment: the environment's variables, which tell whether a launcher started this process.
    """
    global _watch
    if _watch is None:
        launched = any(name in environment for name in LAUNCHERS) or environment.get(OWNER) == str(os.getppid())
        if _was_orphaned(environment):
            _end("the launcher was gone before this process had begun", EXIT_CODE)
        _identify(environment)
        _watch = Watchdog(os.getppid() if launched else None)
        _watch.begin()


def install_handlers(signals: tuple[int, ...]) -> None:
    """Let signals be recorded in ``received`` instead of ending this process; a second Ctrl-C ends it at once.

    Args:
        signals: numbers of the signals.
    """
    start()
    assert _watch is not None
    received.clear()
    _watch._presses.clear()
    for number in signals:
        signal.signal(number, _note)
    _watch.install_wakeup()


def stop_requested() -> bool:
    """Whether this process has been asked to stop or its launcher has ended."""
    return bool(received) or (_watch is not None and _watch.orphaned_at > 0)


def stop_reason() -> str:
    """The reason for stopping, for a text: a signal's name, the end of the launcher, or a signal on another rank."""
    if received:
        return signal.Signals(received[0]).name
    return "the end of its launcher" if _watch is not None and _watch.orphaned_at else "a signal on another rank"


def command_began() -> float:
    """The time at which this process, or the launcher that started it, began, in seconds since 1970."""
    import psutil  # not needed by the commands that read this module's constants

    launched = any(name in os.environ for name in LAUNCHERS)
    for process in (os.getppid() if launched else os.getpid(), os.getpid()):
        with contextlib.suppress(psutil.Error):
            return psutil.Process(process).create_time()
    return time.time()


def longest_standstill(since: float) -> float:
    """The longest time for which this process did not run (stopped, suspended, without a processor).

    Args:
        since: a time of ``time.monotonic()``; standstills that ended before it do not count.

    Returns:
        Seconds; 0 if there was none.
    """
    if _watch is None:
        return 0.0
    time.sleep(2 * LOOK_S)  # the thread may not have run yet since this process woke
    return max((seconds for seconds, ended in _watch.standstills if ended >= since), default=0.0)


_launch = ""


def launch_id(environment: Mapping[str, str] = os.environ) -> str:
    """An id of this launch that all of its ranks have in common, on all machines, and no other launch has.

    It has the parts that are known: DIST_PRUNE_LAUNCH; SLURM's job id and how often the job was requeued; torchrun's
    run id; and, if all ranks are on one machine, the process id and start time of their launcher.

    Args:
        environment: the environment's variables.

    Returns:
        The id, or "" if no part is known.
    """
    if environment is os.environ and _launch:
        return _launch
    job = environment.get("SLURM_HET_JOB_ID") or environment.get("SLURM_JOB_ID")
    requeued = environment.get("SLURM_RESTART_COUNT", "0")
    parts = {
        "launch": environment.get("DIST_PRUNE_LAUNCH"),
        "job": f"{job}.{requeued}" if job else None,
        "run": environment.get("TORCHELASTIC_RUN_ID"),
    }
    local_world = environment.get("LOCAL_WORLD_SIZE")
    if any(name in environment for name in LAUNCHERS) and local_world and local_world == environment.get("WORLD_SIZE"):
        parts["launcher"] = f"{os.getppid()} since {_since(os.getppid())}"
    return ", ".join(f"{name} {value}" for name, value in parts.items() if value and value != "none")


def _identify(environment: Mapping[str, str]) -> None:
    """Store the launch's id while the launcher is alive: an orphan would name another parent."""
    global _launch
    _launch = launch_id(dict(environment))


def _since(process: int) -> str:
    """The start time of a process in the kernel's ticks; process ids are used again, start times are not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "?"


def _was_orphaned(environment: Mapping[str, str]) -> bool:
    """Whether torchrun, whose variable is here, has ended already: the parent is the system's first process.

    In a container torchrun itself may be that one; then it is a Python program.
    """
    if "TORCHELASTIC_RUN_ID" not in environment or os.getppid() != 1:
        return False
    with contextlib.suppress(OSError):
        return not any(word in Path("/proc/1/cmdline").read_text(errors="replace") for word in ("python", "torchrun"))
    return False


def _note(number: int, _frame: FrameType | None) -> None:
    received.append(number)


def _end(reason: str, code: int) -> None:
    with contextlib.suppress(Exception):
        rank = os.environ.get("RANK")
        print(f"error{f' on rank {rank}' if rank else ''}: {reason}", file=sys.stderr, flush=True)
    os._exit(code)

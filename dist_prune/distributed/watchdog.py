"""A thread that sees what the main thread may be too busy to see: signals, the launcher's end, a standstill.

The main thread may sit in a collective, in an import or at the roll, where no handler of Python's runs. Knows no torch,
so that it watches while torch is imported.
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
AT_ONCE = 128 + signal.SIGINT
GRACE_S = 30  # as long as torchrun waits between SIGTERM and SIGKILL
ORPHAN_S = 5.0  # for a run whose launcher is gone: enough to save a small network, not enough to meet the next launch
LOOK_S = 0.5
STILL_S = 5.0  # a thread that sleeps for LOOK_S and wakes so much later did not run in between
PRESS_S = 1.0  # one Ctrl-C arrives twice: from the terminal, and once more from torchrun, which passes it on
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # set by torchrun and accelerate alone

received: list[int] = []  # signals that ask to stop, in order
_watch: "Watchdog | None" = None


class PreemptedError(PruneError):
    """The run was asked to stop and has saved what it had; the same command goes on from there."""

    code = EXIT_CODE


class Watchdog:
    """What the thread knows.

    Attributes:
        parent: the launcher's process, or None where no launcher started this one (a shell may go, its run stays).
        still: for how many seconds this process did not run, and when that ended; each time.
        gone: when the launcher was found to be gone.
    """

    def __init__(self, parent: int | None):
        self.parent, self.orphaned_at = parent, 0.0
        self.standstills: list[tuple[float, float]] = []
        self._presses: list[float] = []
        self._out, self._in = socket.socketpair()
        self._out.setblocking(False)
        self._in.setblocking(False)

    def begin(self) -> None:
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def install_wakeup(self) -> None:
        """Signals are told to the thread the moment they arrive; called in the main thread."""
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
                        self._heard(number, now)
            self._look(now)

    def _heard(self, number: int, now: float) -> None:
        if number != signal.SIGINT:
            return
        if self._presses and now - self._presses[0] > PRESS_S:
            _end("interrupted twice: left at once, without saving", AT_ONCE)
        self._presses.append(now)

    def _look(self, now: float) -> None:
        if self.parent is None or os.getppid() == self.parent:
            return
        self.orphaned_at = self.orphaned_at or now
        if now - self.orphaned_at > (GRACE_S if received else ORPHAN_S):
            _end(f"the launcher (process {self.parent}) is gone; what was saved is intact", EXIT_CODE)


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Watch from now on; the first call counts. The first lines of a program call it, before long imports."""
    global _watch
    if _watch is None:
        launched = any(name in environment for name in LAUNCHERS)
        _identify(environment)
        _watch = Watchdog(os.getppid() if launched else None)
        _watch.begin()


def install_handlers(signals: tuple[int, ...]) -> None:
    """Let these signals be noted instead of ending this process; a second Ctrl-C ends it at once."""
    start()
    assert _watch is not None
    received.clear()
    _watch._presses.clear()
    for number in signals:
        signal.signal(number, _note)
    _watch.install_wakeup()


def stop_requested() -> bool:
    """Whether this process has been asked to stop, or its launcher is gone."""
    return bool(received) or (_watch is not None and _watch.orphaned_at > 0)


def stop_reason() -> str:
    """Who asked, in words."""
    if received:
        return signal.Signals(received[0]).name
    return "the end of its launcher" if _watch is not None and _watch.orphaned_at else "a signal on another rank"


def longest_standstill(since: float) -> float:
    """The longest time in seconds for which this process did not run (stopped, suspended, without a processor).

    ``since``: what ended before that moment of time.monotonic() does not count. 0 for none.
    """
    if _watch is None:
        return 0.0
    time.sleep(2 * LOOK_S)  # woken a moment ago, the thread may not have looked yet
    return max((seconds for seconds, ended in _watch.standstills if ended >= since), default=0.0)


_launch = ""


def launch_id(environment: Mapping[str, str] = os.environ) -> str:
    """What all ranks of this launch have in common, on all machines, and no other launch has; "" where nothing is.

    DIST_PRUNE_LAUNCH where somebody sets it; SLURM's job and how often it was requeued; torchrun's run id; and where
    all ranks are on one machine, their launcher's process and when that began.
    """
    if environment is os.environ and _launch:
        return _launch
    job = environment.get("SLURM_HET_JOB_ID") or environment.get("SLURM_JOB_ID")
    again = environment.get("SLURM_RESTART_COUNT", "0")
    found = {
        "launch": environment.get("DIST_PRUNE_LAUNCH"),
        "job": f"{job}.{again}" if job else None,
        "run": environment.get("TORCHELASTIC_RUN_ID"),
    }
    here = environment.get("LOCAL_WORLD_SIZE")
    if any(name in environment for name in LAUNCHERS) and here and here == environment.get("WORLD_SIZE"):
        found["launcher"] = f"{os.getppid()} since {_since(os.getppid())}"
    return ", ".join(f"{name} {value}" for name, value in found.items() if value and value != "none")


def _identify(environment: Mapping[str, str]) -> None:
    """Take the launch's name while the launcher is there: an orphan would name another parent."""
    global _launch
    _launch = launch_id(dict(environment))


def _since(process: int) -> str:
    """When a process began, in the kernel's ticks; process ids come again, this does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "?"


def _note(number: int, _frame: FrameType | None) -> None:
    received.append(number)


def _end(why: str, code: int) -> None:
    with contextlib.suppress(Exception):
        rank = os.environ.get("RANK")
        print(f"error{f' on rank {rank}' if rank else ''}: {why}", file=sys.stderr, flush=True)
    os._exit(code)

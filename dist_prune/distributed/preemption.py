"""Asked to stop: SIGUSR1, SIGTERM and Ctrl-C set a flag, every loop polls it, all ranks agree before anyone leaves."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Sequence

from dist_prune.distributed import watchdog
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.watchdog import EXIT_CODE, GRACE_S, PreemptedError

__all__ = [
    "EXIT_CODE",
    "GRACE_S",
    "SIGNALS",
    "PreemptedError",
    "defer_signals_in_worker",
    "install_handlers",
    "poll",
    "preempted_error",
    "requested",
]

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # Linux: a signal to this process when its parent ends

_received = watchdog.received


def install_handlers() -> None:
    """Let the signals set the flag instead of ending this process; a second Ctrl-C ends it at once."""
    watchdog.install_handlers(SIGNALS)


def defer_signals_in_worker(_worker: int = 0) -> None:
    """For loader workers: a scheduler signals the whole process group, and they have to serve until the run has saved.

    SIGUSR1 and SIGINT are ignored; SIGTERM ends them after GRACE_S (it is also how a process that exits ends its
    children). They end with their run in any case, also where it is killed.
    """
    end_with_parent()
    signal.set_wakeup_fd(-1)  # the run's own: what a worker hears is no news to it
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_S))


def end_with_parent() -> None:
    """Let the kernel kill this worker process as soon as the process that started it is gone (Linux)."""
    with contextlib.suppress(AttributeError, OSError):  # elsewhere torch's workers look for their parent every 5 s
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # it went before the line above
        os._exit(1)


def requested() -> bool:
    """Whether this process has been asked to stop."""
    return watchdog.stop_requested()


def poll(comm: Communicator, also: Sequence[int] = ()) -> list[int]:
    """[anyone asked to stop, *largest of each number in ``also``] over all ranks: one small collective."""
    return comm.max_ints(int(requested()), *also)


def preempted_error(what: str) -> PreemptedError:
    """The error that ends a run which was asked to stop."""
    return PreemptedError(
        f"stopped by {watchdog.stop_reason()} {what}; the same command goes on from there (exit code {EXIT_CODE})"
    )

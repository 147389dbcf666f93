"""Preemption: SIGUSR1, SIGTERM and Ctrl-C set a flag, every loop polls it, and all ranks stop at the same step."""

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
    """Let ``SIGNALS`` set the flag instead of ending this process; a second Ctrl-C ends it at once.

    Called once by each process, in its main thread.
    """
    watchdog.install_handlers(SIGNALS)


def defer_signals_in_worker(_worker: int = 0) -> None:
    """Set the signal handlers of a loader worker; called in the worker, also as a DataLoader's ``worker_init_fn``.

    A scheduler signals the whole process group, and workers have to serve batches until the run has saved. SIGUSR1 and
    SIGINT are ignored. SIGTERM ends the worker after ``GRACE_S`` seconds, because an exiting process ends its children
    by SIGTERM. The worker ends with its run in any case, also if the run is killed.
    """
    end_with_parent()
    signal.set_wakeup_fd(-1)  # this descriptor is the run's own: a worker's signals do not concern its watchdog
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_S))


def end_with_parent() -> None:
    """Let the kernel kill this worker process as soon as its parent is gone (Linux only)."""
    with contextlib.suppress(AttributeError, OSError):  # elsewhere torch's workers look for their parent every 5 s
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # the parent ended before the line above
        os._exit(1)


def requested() -> bool:
    """Whether this process has been asked to stop; local to the rank, no collective."""
    return watchdog.stop_requested()


def poll(comm: Communicator, also: Sequence[int] = ()) -> list[int]:
    """Ask all ranks whether one of them was asked to stop: one small collective, called by every rank.

    Args:
        comm: all processes.
        also: integers, as many on every rank, whose largest values are wanted too: they cost no further collective.

    Returns:
        [1 if a rank was asked to stop, else 0, then the largest of each integer in ``also``], the same on every rank.
    """
    return comm.max_ints(int(requested()), *also)


def preempted_error(what: str) -> PreemptedError:
    """The error that ends a run after it was asked to stop and has saved.

    Args:
        what: the point that was reached, for the text ("in train, epoch 3, after step 10 of 98").
    """
    return PreemptedError(
        f"stopped by {watchdog.stop_reason()} {what}; the same command resumes there (exit code {EXIT_CODE})"
    )

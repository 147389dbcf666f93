"""Asked to stop: SIGUSR1 and SIGTERM set a flag, every loop polls it, all ranks agree before anyone leaves."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Sequence
from types import FrameType

from dist_prune.errors import PruneError
from dist_prune.runtime.collectives import Ranks

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
GRACE_S = 30  # as long as torchrun waits between SIGTERM and SIGKILL
PR_SET_PDEATHSIG = 1  # Linux: a signal to this process when its parent ends
EXIT_CODE = 75  # sysexits' EX_TEMPFAIL: nothing is wrong, start the same command again

_received: list[int] = []


class PreemptedError(PruneError):
    """The run was asked to stop and has saved what it had; the same command goes on from there."""


def listen() -> None:
    """Let the signals set the flag instead of ending this process."""
    _received.clear()
    for number in SIGNALS:
        signal.signal(number, _note)


def deafen(_worker: int = 0) -> None:
    """For loader workers: a scheduler signals the whole process group, and they have to serve until the run has saved.

    SIGUSR1 is ignored; SIGTERM ends them after GRACE_S (it is also how a process that exits ends its children). They
    end with their run in any case, also where it is killed.
    """
    end_with_parent()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_S))


def end_with_parent() -> None:
    """Let the kernel kill this worker process as soon as the process that started it is gone (Linux)."""
    with contextlib.suppress(AttributeError, OSError):  # elsewhere torch's workers look for their parent every 5 s
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # it went before the line above
        os._exit(1)


def asked() -> bool:
    """Whether this process has been asked to stop."""
    return bool(_received)


def poll(ranks: Ranks, also: Sequence[int] = ()) -> list[int]:
    """[anyone asked to stop, *largest of each number in ``also``] over all ranks: one small collective."""
    return ranks.largest(int(asked()), *also)


def leave(what: str) -> PreemptedError:
    """The error that ends a run which was asked to stop."""
    name = signal.Signals(_received[0]).name if _received else "a signal on another rank"
    return PreemptedError(f"stopped by {name} {what}; the same command goes on from there (exit code {EXIT_CODE})")


def _note(number: int, _frame: FrameType | None) -> None:
    _received.append(number)

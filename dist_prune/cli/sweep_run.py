"""Runs the tasks of a sweep on this machine, each in a process of its own, some at a time."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from dist_prune.cli.sweep_board import LOG, REFRESH_S, WAITS, Board, Row
from dist_prune.distributed.run_program import PROGRAM
from dist_prune.distributed.watchdog import EXIT_CODE, OWNER


class Sweep:
    """The tasks of a sweep file and their processes.

    Args:
        file: the sweep file, or its name.
        entries: ``task`` (its number), ``name`` and ``run`` (its run directory) of each.
        jobs: tasks at a time, which share the cores.
    """

    def __init__(self, file: str, entries: Sequence[dict[str, Any]], jobs: int):
        self._file, self._entries, self._jobs = file, entries, jobs
        self._rows = [Row(entry["name"], Path(entry["run"])) for entry in entries]
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopping = False

    def run(self) -> bool:
        """Run every task and show a board; a finished one takes as long as its check.

        A request to stop (Ctrl-C, SIGTERM, SIGUSR1) is passed on to the running tasks, which save; no other is started.
        Each entry gets ``state``, ``seconds``, ``note`` and ``code`` (None: not started).

        Returns:
            Whether it was asked to stop.
        """
        board = Board(self._rows, self._jobs, sys.stderr)
        with self._stop_on_signals(), ThreadPoolExecutor(self._jobs) as pool:
            waiting: set[Future[None]] = {
                pool.submit(self._run_one, entry, row) for entry, row in zip(self._entries, self._rows, strict=True)
            }
            while waiting:
                board.show()
                done, waiting = wait(waiting, timeout=REFRESH_S / 2)
                for future in done:
                    future.result()  # an error of this program
            board.show(final=True)
        for entry, row in zip(self._entries, self._rows, strict=True):
            entry.setdefault("code", None)
            entry |= {"state": "not started" if row.state == WAITS else row.state}
            entry |= {"seconds": row.seconds, "note": row.note}
        return self._stopping

    def _run_one(self, entry: dict[str, Any], row: Row) -> None:
        threads = max(1, len(os.sched_getaffinity(0)) // self._jobs)
        command = [sys.executable, str(PROGRAM), "--sweep", self._file, "--task", str(entry["task"])]
        # OWNER: a task ends with this process, also if it is killed
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, OWNER: str(os.getpid())}
        with self._lock:
            if self._stopping:
                return
            row.folder.mkdir(parents=True, exist_ok=True)
            with (row.folder / LOG).open("ab") as log:
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            self._processes.add(process)
            row.start()
        if self._stopping:  # asked between the two lines above
            process.send_signal(signal.SIGTERM)
        entry["code"] = process.wait()
        with self._lock:
            self._processes.discard(process)
            row.end(EXIT_CODE if entry["code"] < 0 and self._stopping else entry["code"])

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        def stop(_number: int, _frame: FrameType | None) -> None:
            self._stopping = True
            for process in list(self._processes):
                process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

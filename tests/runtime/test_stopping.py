"""What the signals do to a run's helpers."""

import multiprocessing
import os
import signal
import time

import pytest

from dist_prune.runtime import stopping


def _worker(ready) -> None:
    stopping.listen()
    stopping.deafen()
    ready.set()
    time.sleep(60)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGUSR1, False), (signal.SIGTERM, True)])
def test_a_loader_worker_outlives_usr1_and_not_term(number, ends):
    """SLURM signals every process of a step; a worker that dies of it would fail the run before it can save."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_worker, args=(ready,))
    process.start()
    try:
        assert ready.wait(60)
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(10 if ends else 0.5)
        assert (process.exitcode == -number) if ends else process.is_alive()
    finally:
        process.kill()
        process.join()

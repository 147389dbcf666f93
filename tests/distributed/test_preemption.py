"""Asked to stop while training: what was done is on the disk before any process may end."""

import os
import signal
import time
from pathlib import Path

import pytest

from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.training import checkpoints
from dist_prune.training.evaluation import evaluate
from dist_prune.training.tracking import Tracker
from tests.support import tiny
from tests.training.test_training import digest, trainer

SLOW_S = 1.0


def judge(ranks: Communicator, calls: list[int], at: int):
    """Evaluates for real; the last rank is signalled just before the evaluation with the number ``at``."""

    def act(model) -> dict[str, float]:
        calls.append(1)
        if len(calls) == at and ranks.rank == ranks.world - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return evaluate(model, tiny.digits_feed(), 300, ranks, Tracker(False), "test images")

    return act


def stopped(ranks: Communicator, folder: Path, where: str) -> tuple[list[str], dict | None, list[float], list[dict]]:
    """Files that lie there the moment the training has ended, with a slow disk; then where the next one goes on."""
    handlers = [signal.getsignal(number) for number in preemption.SIGNALS]
    write = checkpoints.write_atomic

    def slow(path: Path, data) -> None:
        time.sleep(SLOW_S)
        write(path, data)

    preemption.install_handlers()
    checkpoints.write_atomic = slow
    try:
        found = trainer(ranks, folder, judge(ranks, [], 1 if where == "judging" else 0))
        if where == "training":
            plain, count = found._after, []

            def after() -> None:
                plain()
                count.append(1)
                if len(count) == 3 and ranks.is_main:
                    os.kill(os.getpid(), signal.SIGUSR1)

            found._after = after  # type: ignore[method-assign]
        with pytest.raises(preemption.PreemptedError, match="in train" if where == "training" else "in test images"):
            found.run()
        there = sorted(path.suffix for path in folder.iterdir()) if ranks.is_main else []
    finally:
        checkpoints.write_atomic = write
        preemption._received.clear()
        for number, handler in zip(preemption.SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
    again = trainer(ranks, folder, judge(ranks, [], 0))
    history = again.run()
    return there, again.resumed, digest(again.model), history


def whole(ranks: Communicator) -> tuple[list[float], list[dict]]:
    found = trainer(ranks, judge=judge(ranks, [], 0))
    history = found.run()
    return digest(found.model), history


@pytest.mark.parametrize(("where", "at"), [("training", {"epoch": 0, "step": 4}), ("judging", {"epoch": 0, "step": 6})])
def test_what_was_done_is_saved_before_the_process_ends(where, at, tmp_path, pool):
    """In a step, and in the evaluation at the end of an epoch (of 6 steps), on two ranks of which one is signalled."""
    weights, history = pool.run(2, whole)[0]
    there, resumed, found, lines = pool.run(2, stopped, tmp_path, where)[0]
    assert there == [".safetensors", ".sha256"], "run.py ends the process without waiting for the writing thread"
    assert resumed == at
    assert found == weights
    same = ("epoch", "loss", "lr", "top1", "test_top1", "test_loss")
    assert [{key: line[key] for key in same} for line in lines] == [
        {key: line[key] for key in same} for line in history
    ]

"""Whole runs that are killed or asked to stop at moments by the seed, and run again: the end is the one of a whole run.

Every case starts processes; a few are a matter of a minute.
"""

import json
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.launch import PYTHON, SMALL, report, run, start, wait_for

Case = tuple[str, Callable[[], None]]
WORDS = (*SMALL, "train.save_every_steps=2", "finetune.save_every_steps=2", "score.save_every=2")
# asked to stop, a run may also die of the signal while it still imports, before it listens
HARMS = {signal.SIGKILL: (-9,), signal.SIGTERM: (75, -15), signal.SIGINT: (75, -2), signal.SIGUSR1: (75, -10)}
_whole: dict[str, Any] = {}


def end(folder: Path) -> dict[str, Any]:
    """What decides whether two runs are the same one: plan, losses."""
    found = report(folder)
    return {"plan": found["plan"]["fingerprint"], "loss": found["finetuned"]["loss"], "dense": found["dense"]["loss"]}


def cases(seed: int, count: int) -> Iterator[Case]:
    """Each case stops one run once, behind its first sign of life or a moment later, and runs it to the end."""
    rng = random.Random(seed)
    for number in range(count):
        harm = list(HARMS)[number % len(HARMS)]
        after = rng.choice(("recipe.yaml", "train_checkpoints/*.sha256", "round_1/scores*", "finetune_checkpoints/*"))
        yield f"run: {harm.name} after {after} ({number})", partial(_try, harm, after, rng.random())


def _try(harm: signal.Signals, after: str, pause: float) -> None:
    place = Path(tempfile.mkdtemp(prefix="dist_prune-kill-"))
    try:
        if not _whole:
            code, output = run(PYTHON, place / "whole", *WORDS)
            assert code == 0, output
            _whole.update(end(place / "whole"))
        process = start(PYTHON, place / "cut", *WORDS)
        wait_for(process, lambda: any((place / "cut").glob(after)))
        time.sleep(pause / 4)
        process.send_signal(harm)
        output, _ = process.communicate(timeout=120)
        assert process.returncode in (0, *HARMS[harm]), f"{process.returncode}: {output}"
        code, output = run(PYTHON, place / "cut", *WORDS)
        assert code == 0, output
        assert end(place / "cut") == _whole, json.dumps([end(place / "cut"), _whole])
    finally:
        shutil.rmtree(place, ignore_errors=True)

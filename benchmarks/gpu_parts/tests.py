"""The tests marked ``gpu``, and the bounds of synchronisations by torch's own warnings."""

import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from benchmarks.gpu_parts.common import Row

ROOT = Path(__file__).resolve().parents[2]
WHAT = "tests marked gpu"
PLACES = ("tests/gpu", "tests/device/test_gpu_waits.py")


def rows(device: torch.device, seconds: float, done: Collection[str] = ()) -> Iterator[Row]:
    """One row: how many passed. On a CPU those that need no card run there."""
    if WHAT in done:
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *PLACES, "--maxfail=40", "-p", "no:cacheprovider"]
    environment = os.environ | ({"DIST_PRUNE_GPU_TESTS": "cpu"} if device.type == "cpu" else {})
    start = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            output, _ = process.communicate(timeout=max(seconds, 60))
            late = ""
        except subprocess.TimeoutExpired:
            process.terminate()
            output, _ = process.communicate()
            late = f"more than {seconds:.0f} s; "
    lines = output.strip().splitlines() or [""]
    row = {
        "what": WHAT, "result": late + lines[-1].strip("= "), "seconds": round(time.perf_counter() - start),
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    }  # fmt: skip
    if process.returncode:
        row["output"] = output[-8000:]  # for the file; the table leaves it out
    yield row

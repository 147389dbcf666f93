"""The tests marked ``gpu``, and those of this machine's loaders and engines that it can run."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu_parts.common import Row

ROOT = Path(__file__).resolve().parents[2]


def rows(device: torch.device, seconds: float) -> Iterator[Row]:
    """One row: how many passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-x", "--maxfail=40", "-p",
               "no:cacheprovider"]  # fmt: skip
    start = time.perf_counter()
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 60))
    except subprocess.TimeoutExpired as error:
        yield {"what": "tests marked gpu", "failed": f"more than {seconds:.0f} s: {str(error.stdout)[-200:]}"}
        return
    lines = found.stdout.strip().splitlines() or [found.stderr[-300:]]
    yield {
        "what": "tests marked gpu", "result": lines[-1].strip("= "), "seconds": round(time.perf_counter() - start),
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))][:40],
    }  # fmt: skip

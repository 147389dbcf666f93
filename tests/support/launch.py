"""Start the real thing: run.py under plain python, torchrun and accelerate, in processes of their own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RUN = str(ROOT / "dist_prune" / "run.py")
PATIENCE_S = 240
# the quickstart, made small: the same stages, a smaller network, fewer epochs
SMALL = (
    "backbone.name=resnet8p_cifar", "train.epochs=2", "finetune.epochs=2", "score.images=100", "score.micro_batch=10",
    "report.latency_repeats=2", "report.latency_batches=[1,8]",
)  # fmt: skip
PYTHON = (sys.executable, RUN)
ACCELERATE = (
    sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch/cpu_2.yaml"),
    "--main_process_port", "0", RUN,
)  # fmt: skip
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", RUN)


def environment(**more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR")}
    return {**clean, "OMP_NUM_THREADS": "1", **more}


def start(
    launcher: tuple[str, ...], folder: Path | None, *words: str, recipe: str = "quickstart", **more: str
) -> subprocess.Popen[str]:
    command = [*launcher, *(() if folder is None else ("--recipe", recipe, "--run-dir", str(folder))), *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(
    launcher: tuple[str, ...], folder: Path | None, *words: str, recipe: str = "quickstart", **more: str
) -> tuple[int, str]:
    """(exit code, everything it printed); without a folder the launcher's words are all there is."""
    process = start(launcher, folder, *words, recipe=recipe, **more)
    try:
        output, _ = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def finish(launcher: tuple[str, ...], folder: Path, *words: str) -> tuple[Path, str]:
    """A whole run that ends well: its directory, and everything it printed."""
    code, output = run(launcher, folder, *words)
    assert code == 0, output
    return folder, output


def wait_for(process: subprocess.Popen[str], condition: Callable[[], object], seconds: float = 120) -> None:
    """Until the condition holds, the process ends or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def plugin(folder: Path, name: str, source: str) -> str:
    """A third party's method on a path of its own, found through the entry-point group; returns the path."""
    (folder / f"{name}_plugin.py").write_text(source)
    info = folder / f"{name}_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[dist_prune.methods]\n{name} = {name}_plugin:Foreign\n")
    return str(folder)

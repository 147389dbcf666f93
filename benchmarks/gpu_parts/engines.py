"""DeepSpeed's ZeRO stages on one GPU: the quickstart through each, where DeepSpeed is installed; same artifacts?"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu_parts.common import Row

ROOT = Path(__file__).resolve().parents[2]


# one process each; the first is the plain run that the others are held beside
CONFIGS = {"cuda": ("gpu_1", "gpu_8_zero1", "gpu_8_zero2", "gpu_8_zero3"), "cpu": ("gpu_1", "cpu_1_zero2")}
NOT_COMPARED = ("checkpoints", "tensorboard")


def run(config: str, folder: Path, seconds: float) -> str:
    """The quickstart through a launch config; empty if it went well, or how it failed."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
               str(ROOT / f"launch/{config}.yaml"), "--num_processes", "1", str(ROOT / "dist_prune/run.py"),
               "--recipe", "quickstart", "--run-dir", str(folder)]  # fmt: skip
    environment = os.environ | ({"DS_ACCELERATOR": "cpu"} if "cpu" in config else {})
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return f"more than {seconds:.0f} s"
    return found.stderr[-300:] if found.returncode else ""


def artifacts(folder: Path) -> set[str]:
    """Names of what a run leaves, without what depends on the time of day."""
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {str(name) for name in names if not set(NOT_COMPARED) & set(name.parts)}


def rows(device: torch.device, seconds: float, done: Collection[str] = ()) -> Iterator[Row]:
    """A row per stage: figures, and whether plan and files are the plain run's."""
    configs = CONFIGS["cuda" if device.type == "cuda" else "cpu"]
    left = [config for config in configs if f"quickstart, {config}" not in done]
    if not left:
        return
    if find_spec("deepspeed") is None:
        left = [config for config in left if "zero" not in config]
        if "DeepSpeed" not in done:
            yield {"what": "DeepSpeed", "missing": "not installed here; python -m dist_prune.cli.main doctor says how"}
    with tempfile.TemporaryDirectory() as place:
        plain: tuple[str, set[str]] | None = None
        for config in dict.fromkeys((configs[0], *left)):
            what, folder = f"quickstart, {config}", Path(place, config)
            failed = run(config, folder, max(seconds / 2, 60))
            if failed:
                yield {"what": what, "failed": failed}
                continue
            report = json.loads((folder / "report.json").read_text())
            found = report["plan"]["fingerprint"], artifacts(folder)
            row = {"what": what, "top1": round(report["finetuned"]["top1"], 2), "plan": found[0][:12]}
            if config == configs[0]:
                plain = found
            elif plain:
                row |= {"same_plan": found[0] == plain[0], "other_files": sorted(found[1] ^ plain[1])}
            if config in left:
                yield row

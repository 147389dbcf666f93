"""DeepSpeed's ZeRO stages on one GPU: the quickstart through each, where DeepSpeed is installed."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu_parts.common import Row

ROOT = Path(__file__).resolve().parents[2]


def rows(device: torch.device, seconds: float) -> Iterator[Row]:
    """A row per stage: exit code and figures beside the plain run's."""
    if find_spec("deepspeed") is None:
        yield {"what": "DeepSpeed", "failed": "not installed on this machine (dist-prune doctor says how to bring it)"}
        return
    for config in ("gpu_1", "gpu_8_zero1", "gpu_8_zero2", "gpu_8_zero3"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
                       str(ROOT / f"launch/{config}.yaml"), "--num_processes", "1", str(ROOT / "dist_prune/run.py"),
                       "--recipe", "quickstart", "--run-dir", folder]  # fmt: skip
            found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=max(seconds / 2, 60))
            if found.returncode:
                yield {"what": f"quickstart, {config}", "failed": found.stderr[-300:]}
                continue
            report = json.loads(Path(folder, "report.json").read_text())
            top1, plan = report["finetuned"]["top1"], report["plan"]["fingerprint"][:12]
            yield {"what": f"quickstart, {config}", "result": f"finetuned top-1 {top1:.2f}, plan {plan}"}

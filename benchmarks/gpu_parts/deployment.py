"""A pruned ResNet-50 at half its MACs: speed-up by precision, batch and form; a latency target and what came of it."""

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.deploy import pruned
from benchmarks.gpu_parts.common import DTYPES, OutOfTimeError, Row, limit, synthetic
from dist_prune.export import bundle
from dist_prune.training.latency import measure_latency

ROOT = Path(__file__).resolve().parents[2]
NAME, SIZE, CLASSES = "resnet50", 224, 1000
BATCHES = {"cuda": (1, 32, 256), "cpu": (1,)}
TARGET = """
name: gpu_latency
backbone: {{name: {name}}}
data: {{source: npz, root: {root}, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}
train: {{epochs: 0}}
finetune: {{epochs: 0}}
score: {{images: 8, micro_batch: 8}}
method: {{name: l1}}
select: {{round_to: 8}}
target: {{latency: 0.6, latency_batch: {batch}}}
report: {{latency_batches: [{batch}], latency_repeats: 50}}
"""


def form_of(model: nn.Module, form: str, precision: str, device: torch.device) -> nn.Module:
    """A copy as it is served: ``eager``, ``folded`` (batch norms in the convolutions), ``compiled`` (folded too)."""
    model = copy.deepcopy(model)
    if form != "eager":
        model = bundle.fuse(model, (3, SIZE, SIZE))
    model = model.to(device, DTYPES[precision]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return torch.compile(model) if form == "compiled" else model  # type: ignore[return-value]


class Cast(nn.Module):
    """Images in the network's precision and memory order, as a server would hand them over."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.to(self.dtype, memory_format=torch.channels_last))


def speed(device: torch.device, form: str, precision: str, batches: tuple[int, ...], repeats: int) -> Iterator[Row]:
    dense, small, _, share = pruned()
    pair = {name: Cast(form_of(model, form, precision, device), DTYPES[precision])
            for name, model in (("dense", dense), ("pruned", small))}  # fmt: skip
    for batch in batches:
        with torch.no_grad():
            found = measure_latency(pair, (3, SIZE, SIZE), (batch,), repeats, device, torch.get_num_threads())
        one, two = found["dense"][str(batch)], found["pruned"][str(batch)]
        yield {
            "what": f"serve {NAME} at {share:.3f} of its MACs, {precision}, {form}, batch {batch}", "beside": "dense",
            "images_per_s": round(two["images_per_s"]), "bare_images_per_s": round(one["images_per_s"]),
            "ratio": round(one["ms"] / two["ms"], 3), "ms": round(two["ms"], 3), "dense_ms": round(one["ms"], 3),
        }  # fmt: skip


def target(device: torch.device, batch: int) -> Row:
    """A whole run that is asked for 0.6 of the dense time."""
    with tempfile.TemporaryDirectory() as folder:
        source = synthetic(64, SIZE, 10)
        np.savez(Path(folder, "images.npz"), x_train=source.images, y_train=source.labels, x_test=source.images[:8],
                 y_test=source.labels[:8])  # fmt: skip
        Path(folder, "recipe.yaml").write_text(TARGET.format(name=NAME, root=f"{folder}/images.npz", batch=batch))
        command = [sys.executable, str(ROOT / "dist_prune/run.py"), "--recipe", f"{folder}/recipe.yaml", "--run-dir",
                   f"{folder}/run"]  # fmt: skip
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {})
        found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
        what = f"latency target 0.6, {NAME}, fp32, batch {batch}"
        if found.returncode not in (0, 3):
            return {"what": what, "failed": (found.stderr or found.stdout)[-300:]}
        report = json.loads(Path(folder, "run/report.json").read_text())
        times = [report[name]["latency"][str(batch)]["ms"] for name in ("dense", "finetuned")]
        left = times[1] / times[0]
        return {"what": what, "beside": "0.6", "measured_share": round(left, 3), "dense_ms": round(times[0], 3),
                "ms": round(times[1], 3), "error_percent": round(100 * abs(left / 0.6 - 1), 1), "bound": 5,
                "exit": found.returncode}  # fmt: skip


def rows(device: torch.device, seconds: float) -> Iterator[Row]:
    """Forms in order of worth, then the target."""
    batches = BATCHES["cuda" if device.type == "cuda" else "cpu"]
    repeats = 50 if device.type == "cuda" else 1
    for form, precision, share in (("eager", "bf16", 0.1), ("folded", "bf16", 0.1), ("target", "", 0.3),
                                   ("compiled", "bf16", 0.35), ("eager", "fp16", 0.1), ("folded", "fp16", 0.1),
                                   ("eager", "fp32", 0.1)):  # fmt: skip
        try:
            with limit(seconds * share):
                if form == "target":
                    yield target(device, batches[-1] if device.type == "cpu" else 64)
                else:
                    yield from speed(device, form, precision, batches, repeats)
        except OutOfTimeError as error:
            yield {"what": f"serve {form} {precision}", "failed": str(error)}
        except Exception as error:
            yield {"what": f"serve {form} {precision}", "failed": f"{type(error).__name__}: {error}"[:300]}
        if device.type == "cuda":
            torch.cuda.empty_cache()

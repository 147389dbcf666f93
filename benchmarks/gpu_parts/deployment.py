"""A pruned ResNet-50 at half its MACs: speed-up by precision, batch and form; a latency target and what came of it."""

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.deploy import pruned
from benchmarks.gpu_parts.common import DTYPES, Row, synthetic, within
from benchmarks.gpu_parts.scoring import network_of
from dist_prune import models
from dist_prune.distributed import tensor_files
from dist_prune.export import bundle
from dist_prune.training.latency import measure_latency

ROOT = Path(__file__).resolve().parents[2]
BATCHES = {"cuda": (1, 32, 256), "cpu": (1,)}
# form, precision, share of the time, in order of worth
FORMS = (
    ("eager", "bf16", 0.08), ("folded", "bf16", 0.08), ("target", "", 0.25), ("compiled", "bf16", 0.25),
    ("eager", "fp16", 0.08), ("folded", "fp16", 0.08), ("eager", "fp32", 0.08), ("compiled", "fp16", 0.1),
)  # fmt: skip
SHARE = 0.6  # of the dense time, asked for
TARGET = """
name: gpu_latency
backbone: {{name: {name}, checkpoint: {dense}}}
data: {{source: npz, root: {root}, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}
train: {{epochs: 0}}
finetune: {{epochs: 0}}
score: {{images: 8, micro_batch: 8}}
method: {{name: l1}}
select: {{round_to: 8}}
target: {{latency: {share}, latency_batch: {batch}, latency_tolerance: null, tolerance: null}}
report: {{latency_batches: [{batch}], latency_repeats: {repeats}}}
"""


def form_of(model: nn.Module, form: str, precision: str, device: torch.device, size: int) -> nn.Module:
    """A copy as it is served: ``eager``, ``folded`` (batch norms in the convolutions), ``compiled`` (folded too)."""
    model = copy.deepcopy(model)
    if form != "eager":
        model = bundle.fuse(model, (3, size, size))
    model = model.to(device, DTYPES[precision]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return torch.compile(model) if form == "compiled" else model  # type: ignore[return-value]


class Cast(nn.Module):
    """Images in the network's precision and memory order, as a server would hand them over."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.to(self.dtype, memory_format=torch.channels_last))


def title(device: torch.device, form: str, precision: str, batch: int) -> str:
    return f"serve {network_of(device)[0]} at half its MACs, {precision}, {form}, batch {batch}"


@cache
def networks(name: str, size: int) -> tuple[nn.Module, nn.Module, float]:
    """Dense and pruned, and the share of the MACs that is left."""
    dense, small, _, share = pruned(name, size)
    return dense, small, share


def speed(device: torch.device, form: str, precision: str, batches: tuple[int, ...], repeats: int) -> Iterator[Row]:
    """Dense and pruned in turns, a row per batch."""
    name, size = network_of(device)
    dense, small, share = networks(name, size)
    pair = {
        kind: Cast(form_of(model, form, precision, device, size), DTYPES[precision])
        for kind, model in (("dense", dense), ("pruned", small))
    }
    for batch in batches:
        with torch.no_grad():
            found = measure_latency(pair, (3, size, size), (batch,), repeats, device, torch.get_num_threads())
        one, two = found["dense"][str(batch)], found["pruned"][str(batch)]
        yield {
            "what": title(device, form, precision, batch), "beside": "dense", "macs_left": round(share, 3),
            "images_per_s": round(two["images_per_s"]), "bare_images_per_s": round(one["images_per_s"]),
            "ratio": round(one["ms"] / two["ms"], 3), "ms": round(two["ms"], 3), "dense_ms": round(one["ms"], 3),
        }  # fmt: skip


def target_title(device: torch.device, batch: int) -> str:
    return f"latency target {SHARE}, {network_of(device)[0]}, fp32, batch {batch}"


def target(device: torch.device, batch: int, seconds: float) -> Iterator[Row]:
    """A whole run that is asked for a share of the dense time."""
    network, size = network_of(device)
    repeats = 50 if device.type == "cuda" else 2
    with tempfile.TemporaryDirectory() as folder:
        source = synthetic(64, size, 10)
        np.savez(Path(folder, "images.npz"), x_train=source.images, y_train=source.labels, x_test=source.images[:8],
                 y_test=source.labels[:8])  # fmt: skip
        torch.manual_seed(0)
        dense = f"{folder}/dense.safetensors"
        tensor_files.save_tensors(Path(dense), models.create(network, 10, 3).state_dict())
        text = TARGET.format(
            name=network, dense=dense, root=f"{folder}/images.npz", batch=batch, share=SHARE, repeats=repeats
        )
        Path(folder, "recipe.yaml").write_text(text)
        command = [sys.executable, str(ROOT / "dist_prune/run.py"), "--recipe", f"{folder}/recipe.yaml", "--run-dir",
                   f"{folder}/run"]  # fmt: skip
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {})
        found = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=max(seconds, 60)
        )
        if found.returncode not in (0, 3):
            yield {"what": target_title(device, batch), "failed": (found.stderr or found.stdout)[-300:]}
            return
        report = json.loads(Path(folder, "run/report.json").read_text())
        times = [report[name]["latency"][str(batch)]["ms"] for name in ("dense", "finetuned")]
        left = times[1] / times[0]
        yield {
            "what": target_title(device, batch), "beside": str(SHARE), "measured_share": round(left, 3),
            "dense_ms": round(times[0], 3), "ms": round(times[1], 3),
            "error_percent": round(100 * abs(left / SHARE - 1), 1), "bound": 5, "exit": found.returncode,
        }  # fmt: skip


def rows(device: torch.device, seconds: float, done: Collection[str] = ()) -> Iterator[Row]:
    """Forms in order of worth, then the target."""
    cuda = device.type == "cuda"
    batches, repeats, asked = BATCHES["cuda" if cuda else "cpu"], 50 if cuda else 1, 64 if cuda else 1
    for form, precision, share in FORMS:
        longest = seconds * share
        if form == "target":
            what = target_title(device, asked)
            if what not in done:
                yield from within(target(device, asked, longest), what, longest)
            continue
        if form == "compiled" and not cuda:
            continue  # minutes of compilation that prove nothing
        left = tuple(batch for batch in batches if title(device, form, precision, batch) not in done)
        if left and f"serve {form} {precision}" not in done:
            yield from within(speed(device, form, precision, left, repeats), f"serve {form} {precision}", longest)
        if cuda:
            torch.cuda.empty_cache()

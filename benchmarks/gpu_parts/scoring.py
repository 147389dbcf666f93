"""Scoring of ResNet-50: images/s of each method, beside a bare forward pass, or a forward and backward pass."""

import gc
import statistics
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.gpu_parts.common import DTYPES, Row, in_turns, peak_mb, ratio, synthetic, within
from dist_prune import methods, models
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training.tracking import Tracker

# the two that a bound is set for, then cheap ones, then those that train or search
ORDER = ("graph", "taylor", "apoz", "fisher", "group_fisher", "hrank", "chip", "hrel", "obd", "hessian_trace", "l1",
         "group_norm", "fpgm", "whc", "bn_scale", "l2", "random", "entropy", "mint", "shapley", "dirichlet",
         "sensitivity")  # fmt: skip
NAME, SIZE, MICRO = "resnet50", 224, 64
DRY = ("resnet18", 64)  # on a CPU, where nothing is measured
SLOW = ("entropy", "mint", "shapley", "dirichlet", "sensitivity")  # timed once, after the others
IMAGES = {"cpu": 8, "cuda": 1024}
BOUND = 1.25


def network_of(device: torch.device) -> tuple[str, int]:
    """Name and side of the images."""
    return (NAME, SIZE) if device.type == "cuda" else DRY


def title(name: str, precision: str, device: torch.device) -> str:
    return f"score {network_of(device)[0]} by {name}, {precision}"


def bench_of(device: torch.device, precision: str, images: int) -> DistributedScoringContext:
    """A network with random weights and synthetic images that lie on the device."""
    torch.manual_seed(0)
    name, size = network_of(device)
    model = models.create(name, 1000, 3).eval()
    channels = trace_groups(model, torch.randn(1, 3, size, size))
    look = TransformConfig(size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    feed = ImageLoader(synthetic(images, size), look, device, dtype=DTYPES[precision])
    model = model.to(device, DTYPES[precision]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return DistributedScoringContext(
        model,
        channels,
        feed,
        np.arange(images),
        DistributedEnvironment(device, DistributedEnvironment.single_process().comm),
        Tracker(False),
        MICRO,
    )


def lists(bench: DistributedScoringContext) -> list[np.ndarray]:
    return [bench.ids[start : start + MICRO] for start in range(0, len(bench.ids), MICRO)]


@torch.no_grad()
def forward(bench: DistributedScoringContext) -> None:
    for batch in bench.loader.batches(lists(bench)):
        bench.model(batch.images)


def backward(bench: DistributedScoringContext) -> None:
    """Gradients of the maps: what scoring needs at least; the weights' are left out on both sides."""
    for parameter in bench.model.parameters():
        parameter.requires_grad_(False)
    for batch in bench.loader.batches(lists(bench)):
        loss = functional.cross_entropy(bench.model(batch.images.requires_grad_(True)), batch.labels, reduction="sum")
        loss.backward()
    for parameter in bench.model.parameters():
        parameter.requires_grad_(True)


def needs_gradients(name: str, bench: DistributedScoringContext) -> bool:
    """Whether the method asks the bench for gradients."""
    asked: list[bool] = []

    class Seen(Exception):
        """Enough is known."""

    def spy(sites: Any, statistic: Any, backward: bool = False, **_: Any) -> Any:
        asked.append(backward)
        raise Seen

    plain, bench.collect = bench.collect, spy  # type: ignore[method-assign]
    try:
        kind = methods.find(name)
        kind(kind.Options()).score(bench)
    except Seen:
        pass
    finally:
        bench.collect = plain  # type: ignore[method-assign]
    return any(asked)


def figures(name: str, bench: DistributedScoringContext, precision: str) -> Iterator[Row]:
    """One row."""
    device = bench.device
    kind = methods.find(name)
    grads = name not in SLOW and needs_gradients(name, bench)
    bare = backward if grads else forward
    acts = {"bare": lambda: bare(bench), "scored": lambda: kind(kind.Options()).score(bench)}
    peak_mb(device)
    acts["bare"]()
    bare_peak = peak_mb(device)
    if name not in SLOW:
        acts["scored"]()
    times = in_turns(acts, 1 if name in SLOW else 3, device, warm=True)
    peak = peak_mb(device)
    images = len(bench.ids)
    yield {
        "what": title(name, precision, device), "beside": "forward, backward" if grads else "forward",
        "images_per_s": round(images / statistics.median(times["scored"])),
        "bare_images_per_s": round(images / statistics.median(times["bare"])),
        "ratio": round(ratio(times, "scored", "bare"), 3), "peak_mb": peak, "bare_peak_mb": bare_peak,
        "bound": BOUND if name in ("graph", "taylor") else None,
    }  # fmt: skip


def rows(device: torch.device, seconds: float, done: Collection[str] = ()) -> Iterator[Row]:
    """A row per method and precision; what fails or takes too long says so."""
    names = [*ORDER, *(name for name in methods.list_names() if name not in ORDER)]
    cheap, slow = ([name for name in names if (name in SLOW) == late] for late in (False, True))
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        for some, share in ((cheap, 0.6), (slow, 0.4)):
            for precision in ("bf16", "fp32"):
                left = [name for name in some if title(name, precision, device) not in done]
                bench = (
                    bench_of(device, precision, IMAGES["cuda" if device.type == "cuda" else "cpu"]) if left else None
                )
                for name in left:
                    assert bench is not None
                    # four times its share: most need far less
                    longest = share * seconds / 2 / len(some) * 4
                    yield from within(figures(name, bench, precision), title(name, precision, device), longest)
                    bench.model.requires_grad_(True)
                    gc.collect()  # what an alarm cut short holds its tensors in cycles
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
    finally:
        torch.backends.cudnn.allow_tf32 = before

"""ScoresNetwork of ResNet-50: images/s of each method, beside a bare forward pass, or a forward and backward pass."""

import gc
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.gpu_parts.common import DTYPES, OutOfTimeError, Row, in_turns, limit, peak_mb, ratio, synthetic
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
IMAGES = {"cpu": 8, "cuda": 1024}
BOUND = 1.25


def bench_of(device: torch.device, precision: str, images: int) -> DistributedScoringContext:
    """ResNet-50 with random weights and synthetic images that lie on the device."""
    torch.manual_seed(0)
    model = models.create(NAME, 1000, 3).eval()
    channels = trace_groups(model, torch.randn(1, 3, SIZE, SIZE))
    look = TransformConfig(SIZE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    feed = ImageLoader(synthetic(images, SIZE), look, device, dtype=DTYPES[precision])
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


def figures(name: str, bench: DistributedScoringContext, precision: str, turns: int) -> Row:
    device = bench.device
    kind = methods.find(name)
    grads = needs_gradients(name, bench)
    bare = backward if grads else forward
    acts = {"bare": lambda: bare(bench), "scored": lambda: kind(kind.Options()).score(bench)}
    peak_mb(device)
    acts["bare"]()
    bare_peak = peak_mb(device)
    acts["scored"]()
    peak = peak_mb(device)
    times = in_turns(acts, turns, device)
    images = len(bench.ids)
    return {
        "what": f"score {name}, {precision}", "beside": "forward, backward" if grads else "forward",
        "images_per_s": round(images / statistics.median(times["scored"])),
        "bare_images_per_s": round(images / statistics.median(times["bare"])),
        "ratio": round(ratio(times, "scored", "bare"), 3), "peak_mb": peak, "bare_peak_mb": bare_peak,
        "bound": BOUND if name in ("graph", "taylor") else None,
    }  # fmt: skip


def rows(device: torch.device, seconds: float) -> Iterator[Row]:
    """A row per method and precision; what fails or takes too long says so."""
    cheap = [name for name in ORDER if not _slow(name)] + [name for name in methods.list_names() if name not in ORDER]
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        for names, share in ((cheap, 0.6), ([name for name in ORDER if _slow(name)], 0.4)):
            for precision in ("bf16", "fp32"):
                bench = bench_of(device, precision, IMAGES["cuda" if device.type == "cuda" else "cpu"])
                for name in names:
                    yield _one(name, bench, precision, share * seconds / 2 / len(names) * 4)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _slow(name: str) -> bool:
    return name in ("entropy", "mint", "shapley", "dirichlet", "sensitivity")


def _one(name: str, bench: DistributedScoringContext, precision: str, seconds: float) -> Row:
    try:
        with limit(seconds):
            return figures(name, bench, precision, 3)
    except OutOfTimeError as error:
        return {"what": f"score {name}, {precision}", "failed": str(error)}
    except Exception as error:  # the others are still worth measuring
        return {"what": f"score {name}, {precision}", "failed": f"{type(error).__name__}: {error}"[:300]}
    finally:
        bench.model.requires_grad_(True)
        gc.collect()  # what an alarm cut short holds its tensors in cycles
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()

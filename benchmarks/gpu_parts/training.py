"""The training loop on ResNet-50 and ResNet-56: images/s beside a bare loop, eager and compiled."""

import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Literal

import torch
from torch.nn import functional

from benchmarks.gpu_parts.common import DTYPES, Row, peak_mb, synthetic, wait, within
from dist_prune import models
from dist_prune.config.training import Training
from dist_prune.data.datasets import ArraySource
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.distributed.environment import DistributedEnvironment
from dist_prune.training.loop import Loop
from dist_prune.training.tracking import Tracker
from dist_prune.training.trainer import Trainer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BOUND = 0.98
PRECISION = "bf16"
PAIRS = 3
# network, side, batch, images per epoch, how it is compiled, share of the time
Compiled = Literal[False, True, "reduce-overhead"]
CASES: tuple[tuple[str, int, int, int, Compiled, float], ...] = (
    ("resnet50", 224, 256, 5120, False, 0.15),
    ("resnet56p_cifar", 32, 256, 25_600, False, 0.15),
    ("resnet50", 224, 256, 5120, True, 0.3),
    ("resnet56p_cifar", 32, 256, 25_600, "reduce-overhead", 0.4),
)


def form(compiled: Compiled) -> str:
    return f", compiled{'' if compiled is True else f' ({compiled})'}" if compiled else ""


def bare(name: str, source: ArraySource, batch: int, device: torch.device, compiled: Compiled, precision: str
         ) -> Callable[[], float]:  # fmt: skip
    """One epoch of the loop that everybody writes first, as a function that returns images per second."""
    torch.manual_seed(0)
    model = models.create(name, len(source.classes), 3).to(device).train()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward = torch.compile(model, mode=None if compiled is True else compiled) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    images = torch.from_numpy(source.images).to(device)
    labels = torch.from_numpy(source.labels).to(device)
    mean, std = (255 * torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))

    def epoch() -> float:
        wait(device)
        start = time.perf_counter()
        for part in torch.randperm(len(labels), device=device).split(batch):
            x = (images[part].permute(0, 3, 1, 2).float() - mean) / std
            with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
                loss = functional.cross_entropy(forward(x), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()
        return len(labels) / (time.perf_counter() - start)

    return epoch


def harness(
    name: str, source: ArraySource, size: int, batch: int, device: torch.device, compiled: Compiled, precision: str
) -> Callable[[], float]:
    """One epoch of this package's loop, with its figures, polls and updates: a warm training, one epoch a call."""
    torch.manual_seed(0)
    settings = Training(
        epochs=PAIRS + 2, batch=batch, lr=0.01, schedule="constant", selection="last", evaluate_every=PAIRS + 2,
        precision=precision, channels_last=True, compile=compiled,
    )  # fmt: skip
    machine = DistributedEnvironment(device, DistributedEnvironment.single_process().comm)
    loop = Loop(settings, ImageLoader(source, TransformConfig(size, MEAN, STD), device), machine, Tracker(False), 0)
    model = models.create(name, len(source.classes), 3)
    return _epochs(Trainer(model, loop, lambda model: {}, classes=len(source.classes)))


def _epochs(trainer: Trainer) -> Callable[[], float]:
    """Runs the trainer in a generator, an epoch at a time."""
    go, done = threading.Semaphore(0), threading.Semaphore(0)
    plain = trainer.loop.run_epoch

    def held(*args, **kwargs):
        go.acquire()
        try:
            return plain(*args, **kwargs)
        finally:
            done.release()

    trainer.loop.run_epoch = held  # type: ignore[method-assign]
    failed: list[BaseException] = []

    def work() -> None:
        try:
            trainer.run()
        except BaseException as error:
            failed.append(error)
            done.release()

    threading.Thread(target=work, daemon=True).start()

    def epoch() -> float:
        count = len(trainer.history)
        go.release()
        done.acquire()
        if failed:
            raise failed[0]
        while len(trainer.history) == count and not failed:
            time.sleep(0.001)
        if failed:
            raise failed[0]
        return trainer.history[-1]["images_per_s"]

    return epoch


def title(name: str, size: int, batch: int, compiled: Compiled) -> str:
    return f"train {name}, {size} px, batch {batch}, {PRECISION}, channels_last{form(compiled)}"


def case(what: str, name: str, size: int, batch: int, images: int, compiled: Compiled, device: torch.device) -> Row:
    """This loop and a bare one, in turns."""
    classes = 10 if size == 32 else 1000
    source = synthetic(images, size, classes)
    peak_mb(device)
    ours = harness(name, source, size, batch, device, compiled, PRECISION)
    ours()
    peak = peak_mb(device)
    theirs = bare(name, source, batch, device, compiled, PRECISION)
    theirs()
    pairs = [(theirs(), ours()) for _ in range(PAIRS)]
    return {
        "what": what,
        "beside": "bare loop", "images_per_s": round(statistics.median(b for _, b in pairs)),
        "bare_images_per_s": round(statistics.median(a for a, _ in pairs)),
        "ratio": round(statistics.median(b / a for a, b in pairs), 3), "peak_mb": peak, "bound": BOUND,
    }  # fmt: skip


def rows(device: torch.device, seconds: float, done: Collection[str] = ()) -> Iterator[Row]:
    """A row per case."""
    for name, size, batch, images, compiled, share in CASES:
        if device.type == "cpu" and compiled:
            continue  # minutes of compilation that prove nothing
        if device.type == "cpu":
            size, batch, images, share = 32, 8, 16, 0.5
        what = title(name, size, batch, compiled)
        if what in done:
            continue
        yield from within(
            (case(what, *given) for given in [(name, size, batch, images, compiled, device)]), what, seconds * share
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()

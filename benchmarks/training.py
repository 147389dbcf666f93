"""What the training loop costs: against a bare PyTorch loop, against timm's own pieces, and what checkpoints cost.

    DIST_PRUNE_DATA=FOLDER python benchmarks/training.py [--images 1280] [--pairs 7] [--json FILE]
    DIST_PRUNE_DATA=FOLDER python benchmarks/training.py --only formats [--threads 1]

The last one: what the keys precision and channels_last make of a CPU's training. Same network, same images, same
optimizer in both columns; pairs are interleaved; medians are quoted, for ratios those of the pairs. Two threads unless
--threads says another number.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "2"

import numpy as np
import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.metrics import AverageMeter
from torch.nn import functional

from dist_prune import models
from dist_prune.config.training import Training
from dist_prune.data.datasets import ArraySource, open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.training.checkpoints import CheckpointManager
from dist_prune.training.loop import Loop
from dist_prune.training.tracking import Tracker
from dist_prune.training.trainer import Trainer

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CASES = (("resnet20_cifar", 32, 128), ("resnet50", 64, 32))
FORMATS = ({"channels_last": True}, {"precision": "bf16"}, {"precision": "bf16", "channels_last": True})
FILES_NET, WORKERS = "resnet18", 2
EPOCH = 50_000  # images of a real epoch, CIFAR-10's


def source_of(images: int, size: int) -> tuple[ArraySource, str]:
    """Images of the size asked for, uint8, and what they are."""
    place = Path(os.environ.get("DIST_PRUNE_DATA", "/nowhere")) / "cifar10.npz"
    if place.is_file():
        whole = open_source("npz", str(place), "", True)
        assert isinstance(whole, ArraySource)
        pixels, labels, what = whole.images[:images], whole.labels[:images], "real CIFAR-10"
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
        labels, what = np.arange(images) % 10, "NOISE (no data here)"
    larger = pixels.repeat(size // 32, axis=1).repeat(size // 32, axis=2)
    return ArraySource(np.ascontiguousarray(larger), labels.astype(np.int64), tuple("0123456789")), what


def bare(name: str, source: ArraySource, batch: int) -> float:
    """Images per second of the loop that everybody writes first."""
    torch.manual_seed(0)
    model = models.create(name, 10, 3).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    images, labels = torch.from_numpy(source.images).permute(0, 3, 1, 2), torch.from_numpy(source.labels)
    mean, std = (255 * torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    start, seen = time.perf_counter(), 0
    for part in torch.randperm(len(labels)).split(batch):
        x = (images[part].float() - mean) / std
        loss = functional.cross_entropy(model(x), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        seen += len(part)
    return seen / (time.perf_counter() - start)


def harness(name: str, source: ArraySource, batch: int, size: int, **keys: Any) -> float:
    """Images per second of one epoch of this package's loop, with its figures, polls and updates."""
    torch.manual_seed(0)
    machine = DistributedEnvironment.single_process()
    settings = Training(epochs=1, batch=batch, lr=0.01, schedule="constant", selection="last", evaluate_every=1, **keys)
    loop = Loop(
        settings, ImageLoader(source, TransformConfig(size, MEAN, STD), machine.device), machine, Tracker(False), 0
    )
    history = Trainer(models.create(name, 10, 3), loop, lambda model: {}, classes=10).run()
    return history[0]["images_per_s"]


def timm_loop(folder: Path, images: int, batch: int, size: int) -> float:
    """Images per second of timm's pieces as its train.py puts them together: dataset, loader, optimizer, schedule."""
    torch.manual_seed(0)
    dataset = create_dataset("", root=str(folder), split="val", is_training=True)
    dataset.reader.samples = dataset.reader.samples[:images]
    loader: Any = create_loader(
        dataset, (3, size, size), batch, is_training=True, use_prefetcher=False, color_jitter=0, hflip=0.5,
        interpolation="bilinear", num_workers=WORKERS, persistent_workers=False, mean=MEAN, std=STD,
    )  # fmt: skip
    model = models.create(FILES_NET, 1000, 3).train()
    optimizer = create_optimizer_v2(model, "momentum", lr=0.01, weight_decay=5e-4, momentum=0.9)
    schedule, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=1, step_on_epochs=False, updates_per_epoch=16)
    loss_of, losses, seen = torch.nn.CrossEntropyLoss(), AverageMeter(), 0
    start = time.perf_counter()
    for number, (x, y) in enumerate(loader):
        loss = loss_of(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), len(x))
        schedule.step_update(number)
        seen += len(x)
    return seen / (time.perf_counter() - start)


def harness_files(folder: Path, images: int, batch: int, size: int) -> float:
    """The same through this package's loop and torch backend."""
    torch.manual_seed(0)
    machine = DistributedEnvironment.single_process()
    source = open_source("imagefolder", str(folder), "val", True)
    settings = Training(epochs=1, batch=batch, lr=0.01, selection="last", images=images)
    look = TransformConfig(size, MEAN, STD, augment="resized_crop_flip")
    feed = ImageLoader(source, look, machine.device, WORKERS)
    loop = Loop(settings, feed, machine, Tracker(False), 0)
    start = time.perf_counter()
    Trainer(models.create(FILES_NET, 1000, 3), loop, lambda model: {}, classes=1000).run()
    feed.close()  # timm's workers end with its epoch as well
    return images / (time.perf_counter() - start)


def kept(name: str, source: ArraySource, batch: int, size: int, place: Path | None) -> float:
    """Seconds of one epoch, with a checkpoint at its end where there is a place for it; on the disk when it returns."""
    torch.manual_seed(0)
    machine = DistributedEnvironment.single_process()
    settings = Training(epochs=1, batch=batch, lr=0.01, schedule="constant", selection="last")
    loop = Loop(
        settings, ImageLoader(source, TransformConfig(size, MEAN, STD), machine.device), machine, Tracker(False), 0
    )
    states = CheckpointManager(Path(tempfile.mkdtemp(dir=place)), "benchmark") if place is not None else None
    trainer = Trainer(models.create(name, 10, 3), loop, lambda model: {}, checkpoints=states, classes=10)
    start = time.perf_counter()
    trainer.run()
    return time.perf_counter() - start


def compare(one: Callable[[], float], other: Callable[[], float], pairs: int) -> dict[str, float]:
    """Medians of both and of the ratio other / one, after a first round that does not count."""
    one(), other()
    found = [(one(), other()) for _ in range(pairs)]
    return {
        "one": statistics.median(a for a, _ in found),
        "other": statistics.median(b for _, b in found),
        "ratio": statistics.median(b / a for a, b in found),
        "difference": statistics.median(b - a for a, b in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=1280)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", choices=("loop", "files", "checkpoints", "formats"), help="one of the four tables")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the same figures here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    body: dict[str, Any] = {
        "machine": describe_environment(DistributedEnvironment.single_process()),
        "pairs": given.pairs,
        "cases": {},
    }
    rows = body["cases"]
    for name, size, batch in CASES if given.only in (None, "loop") else ():
        source, body["data"] = source_of(given.images if size == 32 else given.images // 8, size)
        rows[f"loop: {name}, {size} px, batch {batch}"] = compare(
            partial(bare, name, source, batch), partial(harness, name, source, batch, size), given.pairs
        ) | {"of": "images/s, bare loop | harness", "bound": "at least 0.95x"}
    for name, size, batch in CASES if given.only in (None, "formats") else ():
        source, body["data"] = source_of(given.images if size == 32 else given.images // 8, size)
        for words in FORMATS:
            rows[f"formats: {name}, {' '.join(f'{k}={v}' for k, v in words.items())}"] = compare(
                partial(harness, name, source, batch, size),
                partial(harness, name, source, batch, size, **words),
                given.pairs,
            ) | {"of": "images/s, fp32 and NCHW | so", "bound": ""}
    folder = Path(os.environ.get("DIST_PRUNE_DATA", "/nowhere")) / "imagenet_1000"
    if folder.is_dir() and given.only in (None, "files"):
        asked = (folder, given.images // 4, 32, 64)
        rows[f"JPEGs: {FILES_NET}, 64 px, {WORKERS} workers"] = compare(
            partial(timm_loop, *asked), partial(harness_files, *asked), given.pairs
        ) | {"of": "images/s, timm's pieces | harness", "bound": "at least 0.97x"}
    for name, size, batch in CASES if given.only in (None, "checkpoints") else ():
        source, body["data"] = source_of(given.images if size == 32 else given.images // 8, size)
        with tempfile.TemporaryDirectory() as place:
            row = compare(
                partial(kept, name, source, batch, size, None),
                partial(kept, name, source, batch, size, Path(place)),
                given.pairs,
            )
            # by default one at every epoch and every ten minutes
            interval = min(600.0, row["one"] * EPOCH / len(source.labels))
            row |= {"ratio": 1 + row["difference"] / interval, "of": f"seconds, without | with; every {interval:.0f} s"}
            bound = {"bound": "at most 1.02 times as long", "unit": " times as long"}
            rows[f"checkpoint: {name}, {len(source.labels)} images"] = row | bound
    machine = f"{body['machine']['processor']}, {given.threads} thread(s)"
    print(f"{machine}; {body.get('data', 'real JPEGs')}; medians of {given.pairs} pairs")
    for case, row in rows.items():
        figures = f"{row['one']:9.2f} {row['other']:9.2f} {row['ratio']:6.3f}{row.get('unit', 'x')}"
        print(f"{case:48} {figures}  {row['bound']:32} {row['of']}")
    if given.json:
        given.json.write_text(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()

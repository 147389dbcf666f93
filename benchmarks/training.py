"""What the training loop costs against a bare hand-written PyTorch loop: same network, images in memory, optimizer.

    python benchmarks/training.py [--images 1280] [--pairs 7] [--json FILE]

Real CIFAR-10 where DIST_PRUNE_DATA has it (else noise, and the table says so). Pairs are interleaved; medians are
quoted, for ratios those of the pairs. Two threads.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "2"

import numpy as np
import torch
from torch.nn import functional

from dist_prune.recipe import Training
from dist_prune.runtime import backbones
from dist_prune.runtime.data.feed import Feed, Look
from dist_prune.runtime.data.sources import ArraySource, open_source
from dist_prune.runtime.machine import Machine, describe
from dist_prune.runtime.tracking import Tracker
from dist_prune.runtime.training.loop import Loop
from dist_prune.runtime.training.train import Trainer

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CASES = (("resnet20_cifar", 32, 128), ("resnet50", 64, 32))


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
    model = backbones.create(name, 10, 3).train()
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


def harness(name: str, source: ArraySource, batch: int, size: int) -> float:
    """Images per second of one epoch of this package's loop, with its figures, polls and updates."""
    torch.manual_seed(0)
    machine = Machine.alone()
    settings = Training(epochs=1, batch=batch, lr=0.01, schedule="constant", selection="last", evaluate_every=1)
    loop = Loop(settings, Feed(source, Look(size, MEAN, STD), machine.device), machine, Tracker(False), 0)
    history = Trainer(backbones.create(name, 10, 3), loop, lambda model: {}, classes=10).run()
    return history[0]["images_per_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=1280)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the same figures here")
    given = parser.parse_args()
    torch.set_num_threads(2)
    body = {"machine": describe(Machine.alone()), "pairs": given.pairs, "cases": {}}
    for name, size, batch in CASES:
        count = given.images if size == 32 else given.images // 8
        source, body["data"] = source_of(count, size)
        bare(name, source, batch), harness(name, source, batch, size)
        found = [(bare(name, source, batch), harness(name, source, batch, size)) for _ in range(given.pairs)]
        body["cases"][f"{name}, {size} px, batch {batch}"] = {
            "bare": statistics.median(a for a, _ in found),
            "harness": statistics.median(b for _, b in found),
            "ratio": statistics.median(b / a for a, b in found),
        }
    print(f"{body['machine']['processor']}, 2 threads; {body['data']}; {given.pairs} pairs")
    print(f"{'images/s':40} {'bare':>9} {'harness':>9} {'ratio':>7}  bound")
    for case, row in body["cases"].items():
        print(f"{case:40} {row['bare']:9.1f} {row['harness']:9.1f} {row['ratio']:6.2f}x  at least 0.95x")
    if given.json:
        given.json.write_text(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()

"""What FFCV brings: its speed against the torch backend on real JPEGs, what stays behind, and the accuracy it gives.

    python benchmarks/beton.py [--pairs 7] [--json FILE]
    python benchmarks/beton.py --parity      MobileNetV2 on the same 1,000 images through both backends (minutes)

Needs DIST_PRUNE_DATA (imagenet_1000/val; for --parity imagenet_1000_rot180 and the MobileNetV2 weights). The .beton
files are written to a temporary folder first. Contenders take turns, one epoch each; quoted are medians and the median
of the rounds' ratios. Warm cache; compiling is timed by itself. Two workers (processes of torch, threads of FFCV).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import psutil
import torch

from dist_prune import models
from dist_prune.data.datasets import FolderSource, open_source
from dist_prune.data.ffcv.backend import FfcvSource, open_beton
from dist_prune.data.ffcv.encoder import Settings
from dist_prune.data.ffcv.writer import write_beton
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.sampling import micro_batches
from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.models.torchvision_weights import translate_names
from dist_prune.training.evaluation import evaluate
from dist_prune.training.tracking import Tracker

CPU, BATCH, WORKERS, SIDE = torch.device("cpu"), 50, 2, 224
TRAINING = TransformConfig(SIDE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875, augment="resized_crop_flip")
HALF = (0.5, 0.5, 0.5)
# what the .beton keeps: name -> max_resolution, quality, write mode
KEPT = {"jpg, 256": Settings(256, 90, "jpg"), "raw, 256": Settings(256, 90, "raw")}
WHOLE = {"jpg, whole": Settings(4096, 90, "jpg"), "raw, whole": Settings(4096, 90, "raw")}


class Quiet:
    def __init__(self, *_: int):
        pass

    def update(self, _: int) -> None:
        pass

    def close(self) -> None:
        pass


def written(source: FolderSource, settings: Settings, folder: Path) -> tuple[FfcvSource, dict[str, float]]:
    """A .beton of the source, and what writing it took."""
    out = folder / f"{settings.write_mode}_{settings.max_resolution}.beton"
    start = time.perf_counter()
    facts = write_beton(source, {}, out, settings, WORKERS, lambda text: None, Quiet)
    seconds = time.perf_counter() - start
    return open_beton(out), {"images_per_s": facts["count"] / seconds, "mb": facts["bytes"] / 2**20}


def epoch(feed: ImageLoader, look: str, number: int) -> float:
    """Images per second of one pass in a new order."""
    order = np.random.default_rng(number).permutation(len(feed))
    start = time.perf_counter()
    count = sum(len(b.ids) for b in feed.batches(micro_batches(order, BATCH), (0, number) if look == "train" else None))
    return count / (time.perf_counter() - start)


def speed(place: Path, folder: Path, rounds: int) -> dict[str, Any]:
    source = open_source("imagefolder", str(place / "imagenet_1000"), "val", True)
    assert isinstance(source, FolderSource)
    feeds, body = {"torch": ImageLoader(source, TRAINING, CPU, WORKERS)}, {"written": {}, "compile_s": 0.0}
    for name, settings in (KEPT | WHOLE).items():
        beton, body["written"][name] = written(source, settings, folder)
        feeds[name] = ImageLoader(beton, TRAINING, CPU, WORKERS)
    start = time.perf_counter()
    next(feeds["raw, 256"].batches([np.arange(1)]))
    body["compile_s"] = time.perf_counter() - start
    for look in ("train", "eval"):
        found: dict[str, list[float]] = {name: [] for name in feeds}
        for number in range(rounds + 1):  # the first round warms up
            for name, feed in feeds.items():
                rate = epoch(feed, look, number)
                if number:
                    found[name].append(rate)
        body[look] = {
            name: {
                "images_per_s": statistics.median(values),
                "ratio": statistics.median(a / b for a, b in zip(values, found["torch"], strict=True)),
            }
            for name, values in found.items()
        }
    body["kept"] = kept(open_beton(folder / "jpg_256.beton"))
    feeds["torch"].close()
    return body


def kept(source: FfcvSource) -> dict[str, Any]:
    """Resident memory (MB) and threads after the third and the last of 20 epochs, and of 20 loaders left half-way."""
    me, lists, out = psutil.Process(), micro_batches(np.arange(500), 25), {}

    def whole(number: int) -> None:
        for _ in ImageLoader(source, TRAINING, CPU, WORKERS).batches(lists, (0, number)):
            pass

    def abandoned(number: int) -> None:
        batches = ImageLoader(source, TRAINING, CPU, WORKERS).batches(lists, (0, number))
        next(batches), next(batches)

    for name, act in (("20 epochs", whole), ("20 abandoned loaders", abandoned)):
        states = []
        for number in range(20):
            act(number)
            states.append((me.memory_info().rss / 2**20, me.num_threads()))
        out[name] = {"rss_mb": [states[2][0], states[-1][0]], "threads": [states[2][1], states[-1][1]]}
    return out


def parity(place: Path, folder: Path, stored: list[str]) -> dict[str, Any]:
    """Accuracy of MobileNetV2 on the same images through each backend, with the recipe's evaluation look."""
    model = models.create("mobilenetv2_100", 1000, 3)
    weights = tensor_files.read_weights(place / "weights/mobilenetv2_imagenet_rot180.safetensors")
    tensor_files.load_strictly(model, translate_names(weights, model.state_dict()), "the weights")
    source = open_source("imagefolder", str(place / "imagenet_1000_rot180"), "val", False)
    assert isinstance(source, FolderSource)
    look, out = TransformConfig(SIDE, HALF, HALF, 0.875), {}
    sources: dict[str, Any] = {"torch": source}
    sources |= {
        name: written(source, settings, folder)[0] for name, settings in (WHOLE | KEPT).items() if name in stored
    }
    for name, each in sources.items():
        feed = ImageLoader(each, look, CPU, WORKERS)
        out[name] = evaluate(model, feed, BATCH, Communicator(), Tracker(False))
        feed.close()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--parity", action="store_true")
    parser.add_argument("--stored", nargs="*", default=[*WHOLE, *KEPT], help="for --parity: which of the .beton files")
    parser.add_argument("--json", type=Path, help="write the same figures here")
    given = parser.parse_args()
    place = Path(os.environ.get("DIST_PRUNE_DATA", "/nowhere"))
    if not (place / "imagenet_1000" / "val").is_dir():
        sys.exit("DIST_PRUNE_DATA names no folder with imagenet_1000: there is nothing to measure on")
    torch.set_num_threads(2 if given.parity else 1)
    machine = describe_environment(DistributedEnvironment.single_process())
    print(f"{machine['processor']}, {machine['cores']} cores")
    with tempfile.TemporaryDirectory() as folder:
        body = parity(place, Path(folder), given.stored) if given.parity else speed(place, Path(folder), given.pairs)
    if given.parity:
        dense = body["torch"]
        for name, row in body.items():
            off = row["top1"] - dense["top1"]
            print(
                f"  {name:12} top-1 {row['top1']:6.2f} ({off:+.2f})  top-5 {row['top5']:6.2f}  loss {row['loss']:.5f}"
            )
    else:
        print(f"compiling, once per process: {body['compile_s']:.1f} s; {given.pairs} rounds")
        for look, bound in (("train", "jpg at least 1.5x, raw at least 3x"), ("eval", "no bound")):
            print(f"\n{look} ({bound})")
            for name, row in body[look].items():
                print(f"  {name:12} {row['images_per_s']:8.0f} images/s  {row['ratio']:5.2f}x")
        for name, row in body["written"].items():
            print(f"writing {name:12} {row['images_per_s']:8.0f} images/s, {row['mb']:.0f} MB")
        for name, row in body["kept"].items():
            (early, late), threads = row["rss_mb"], row["threads"]
            print(f"{name}: resident {early:.0f} -> {late:.0f} MB, threads {threads[0]} -> {threads[1]}")
    if given.json:
        given.json.write_text(json.dumps({"machine": machine, "figures": body}, indent=1))


if __name__ == "__main__":
    main()

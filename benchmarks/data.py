"""What images cost: each backend on real JPEGs against timm's loader, arrays in memory, what stays in memory, start-up.

    python benchmarks/data.py [--pairs 7] [--images 1000] [--json FILE]
    python benchmarks/data.py --forms                decoders and forms of storage alone (data_forms.py)
    python benchmarks/data.py --scoring 20000        data-wait share of an exact scoring epoch on two ranks (minutes)

Needs DIST_PRUNE_DATA (imagenet_1000/val and cifar10.npz; for --scoring the MobileNetV2 weights as well). Contenders
take turns, one epoch each; quoted are medians and the median of the rounds' ratios. Two workers, one thread each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks.data_forms

import numpy as np
import psutil
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks import data_forms
from dist_prune import methods, models
from dist_prune.data import folder_index, folder_scan
from dist_prune.data.datasets import ArraySource, open_source
from dist_prune.data.loader import Batch, ImageLoader, TransformConfig
from dist_prune.data.sampling import micro_batches
from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import shutdown
from dist_prune.distributed.environment import DistributedEnvironment, describe_environment
from dist_prune.models.torchvision_weights import translate_names
from dist_prune.pruning.surgery.verified_trace import trace_groups
from dist_prune.scoring.context import DistributedScoringContext
from dist_prune.training.tracking import Tracker

CPU, BATCH, WORKERS, SIDE = torch.device("cpu"), 50, 2, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAINING = TransformConfig(SIDE, MEAN, STD, 0.875, augment="resized_crop_flip")
Epoch = Callable[[int], int]  # epoch number -> images that were handed out


def data() -> Path:
    place = Path(os.environ.get("DIST_PRUNE_DATA", "/nowhere"))
    if not (place / "imagenet_1000" / "val").is_dir():
        sys.exit("DIST_PRUNE_DATA names no folder with imagenet_1000: there is nothing to measure on")
    return place


def epochs_of(feed: ImageLoader, count: int, batch: int = BATCH) -> Epoch:
    """Training epochs of a feed."""

    def epoch(number: int) -> int:
        order = np.random.default_rng(number).permutation(count)
        return sum(len(part.ids) for part in feed.batches(micro_batches(order, batch), (0, number)))

    return epoch


def torch_backend(place: Path, count: int) -> Epoch:
    source = open_source("imagefolder", str(place / "imagenet_1000"), "val", True)
    return epochs_of(ImageLoader(source, TRAINING, CPU, WORKERS), count)


def timm_loader(place: Path, count: int) -> Epoch:
    """timm's create_loader with the same crop, flip, normalisation and workers."""
    images = ImageDataset(str(place / "imagenet_1000" / "val"))
    chosen: Any = torch.utils.data.Subset(images, range(count))
    loader = create_loader(
        chosen, (3, SIDE, SIDE), BATCH, is_training=True, color_jitter=None, interpolation="bilinear", mean=MEAN,
        std=STD, num_workers=WORKERS, device=CPU,
    )  # type: ignore[arg-type] # fmt: skip
    images.transform = chosen.transform
    return lambda number: sum(len(labels) for _, labels in loader)


# name -> (place, images) -> one epoch; a backend joins the table by a line here
JPEG: dict[str, Callable[[Path, int], Epoch]] = {"timm": timm_loader, "torch": torch_backend}


class Single(Dataset[Any]):
    """CIFAR-10 image by image, as everybody's first loader has it."""

    def __init__(self, source: ArraySource, count: int):
        self.source, self.count = source, count
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, 4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        return self.transform(Image.fromarray(self.source.images[number])), int(self.source.labels[number])


def memory_contenders(place: Path, count: int) -> dict[str, Epoch]:
    source = open_source("npz", str(place / "cifar10.npz"), "", True)
    assert isinstance(source, ArraySource)
    loader = DataLoader(Single(source, count), 128, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    feed = ImageLoader(source, TransformConfig(32, MEAN, STD, augment="crop_flip"), CPU)
    return {
        "DataLoader": lambda number: sum(len(labels) for _, labels in loader),
        "memory": epochs_of(feed, count, 128),
    }


def rates(contenders: dict[str, Epoch], rounds: int) -> dict[str, list[float]]:
    """Images per second of each, in turns; one epoch before that starts workers and fills caches."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, epoch in contenders.items():
            start = time.perf_counter()
            images = epoch(number)
            if number:
                found[name].append(images / (time.perf_counter() - start))
    return found


def table(found: dict[str, list[float]], against: str) -> dict[str, dict[str, float]]:
    return {
        name: {
            "images_per_s": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, found[against], strict=True)),
        }
        for name, values in found.items()
    }


def kept(place: Path) -> dict[str, Any]:
    """Memory (MB, with the workers'; shared pages once) and threads over 20 epochs and over 20 loaders left early."""
    me = psutil.Process()
    source = open_source("imagefolder", str(place / "imagenet_1000"), "val", True)
    feed, lists = ImageLoader(source, TRAINING, CPU, WORKERS), micro_batches(np.arange(200), 25)

    def state() -> tuple[float, int, int]:
        family = [me, *me.children()]
        return sum(p.memory_full_info().pss for p in family) / 2**20, me.num_threads(), len(family)

    def epochs() -> Iterator[tuple[float, int, int]]:
        for number in range(20):
            for _ in feed.batches(lists, (0, number)):
                pass
            yield state()

    def abandoned() -> Iterator[tuple[float, int, int]]:
        for number in range(20):
            next(ImageLoader(source, TRAINING, CPU, WORKERS).batches(lists, (0, number)))
            yield state()

    out = {}
    for name, states in (("20 epochs", list(epochs())), ("20 abandoned loaders", list(abandoned()))):
        seen = [states[number] for number in (2, 10, 19)]
        out[name] = {key: [one[place] for one in seen] for place, key in enumerate(("mb", "threads", "processes"))}
    feed.close()
    return out


def start_up(count: int = 1_281_167, classes: int = 1000) -> dict[str, float]:
    """Seconds to open an image folder of ImageNet's size from its index (folders are there, files are not)."""
    with tempfile.TemporaryDirectory() as folder:
        root, names = Path(folder) / "train", [f"n{number:08}" for number in range(classes)]
        for name in names:
            (root / name).mkdir(parents=True)
            os.utime(root / name, (1e9, 1e9))
        os.utime(root, (1e9, 1e9))
        labels = np.sort(np.arange(count) % classes)
        files = folder_index.Names.from_names(
            f"{names[label]}/{names[label]}_{i}.JPEG" for i, label in enumerate(labels.tolist())
        )
        folders = ("", *names)
        changed = np.array([os.stat(root / name).st_mtime_ns for name in folders])
        made = folder_index.FolderIndex(
            files, labels, np.full(count, 110_000), tuple(names), folders, changed, time.time_ns()
        )
        folder_index.save(made, folder_index.index_locations(root)[0])
        start = time.perf_counter()
        source = open_source("imagefolder", folder, "train", True)
        assert len(source.labels) == count
        return {"images": count, "seconds": time.perf_counter() - start}


class Waiting(ImageLoader):
    """A feed that knows how long it was waited for."""

    waited = 0.0

    def batches(self, dealt: Any, augment: Any = None) -> Iterator[Batch]:
        found = super().batches(dealt, augment)
        while True:
            start = time.perf_counter()
            part = next(found, None)
            self.waited += time.perf_counter() - start
            if part is None:
                return
            yield part


def scoring_rank(count: int, folder: str) -> None:
    """One of the ranks of an exact scoring epoch (graph) of MobileNetV2."""
    machine, place = DistributedEnvironment.start(), data()
    model = models.create("mobilenetv2_100", 1000, 3).eval()
    weights = tensor_files.read_weights(place / "weights/mobilenetv2_imagenet_rot180.safetensors")
    tensor_files.load_strictly(model, translate_names(weights, model.state_dict()), "the weights")
    source = open_source("imagefolder", folder, "val", True)
    feed = Waiting(source, TransformConfig(SIDE, (0.5,) * 3, (0.5,) * 3, 0.875), machine.device, 1)
    channels = trace_groups(model, torch.randn(1, 3, SIDE, SIDE))
    kind = methods.find("graph")
    bench = DistributedScoringContext(
        model.to(machine.device), channels, feed, np.arange(count), machine, Tracker(False), BATCH
    )
    start = time.perf_counter()
    kind(kind.Options()).score(bench)
    seconds = time.perf_counter() - start
    shares = machine.comm.all_gather_object(feed.waited / seconds)
    if machine.comm.is_main:
        print(json.dumps({"images": count, "seconds": seconds, "data_wait": shares, "ranks": machine.comm.world}))
    shutdown(machine.comm)


def scoring(count: int) -> dict[str, Any]:
    """The JPEG tree repeated (by links) to ``count`` entries, scored on two ranks with one loader worker each."""
    originals = sorted((data() / "imagenet_1000" / "val").rglob("*.JPEG")) or sorted(
        file for file in (data() / "imagenet_1000" / "val").rglob("*") if file.suffix.lower() in folder_scan.IMAGE_FILES
    )
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            file = originals[number % len(originals)]
            link = Path(folder) / "val" / file.parent.name / f"{number // len(originals):03}_{file.name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launcher, __file__, "--rank-of", folder, "--scoring", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        return json.loads(done.stdout.splitlines()[-1])


def show(body: dict[str, Any]) -> None:
    print(f"{body['machine']['processor']}, {body['machine']['cores']} cores; {body['rounds']} rounds")
    for title, bound in (("jpeg", "torch at least 0.97x timm"), ("memory", "memory at least 3x DataLoader")):
        print(f"\n{title} ({bound})")
        for name, row in body[title].items():
            print(f"  {name:24} {row['images_per_s']:10.1f} images/s  {row['ratio']:6.2f}x")
    data_forms.show(body)
    for name, row in body["kept"].items():
        memory = ", ".join(f"{value:.0f}" for value in row["mb"])
        print(
            f"\n{name}, after the 3rd, 11th, 20th: {memory} MB, threads {row['threads']}, processes {row['processes']}"
        )
    print(f"\nopening {body['start_up']['images']:,} images by their index: {body['start_up']['seconds']:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--images", type=int, default=1000, help="JPEGs per epoch")
    parser.add_argument("--forms", action="store_true", help="decoders and forms of storage alone")
    parser.add_argument("--scoring", type=int, help="entries of the scoring epoch")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the same figures here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.rank_of:
        scoring_rank(given.scoring, given.rank_of)
        return
    if given.forms:
        body = {
            "forms": data_forms.rates(data(), given.images, given.pairs),
            "reads": data_forms.reads(data(), given.pairs),
        }
        data_forms.show(body)
    elif given.scoring:
        body = scoring(given.scoring)
        waits = ", ".join(f"{share:.1%}" for share in body["data_wait"])
        print(f"{body['images']:,} images on {body['ranks']} ranks: {body['seconds']:.0f} s, data-wait share {waits}")
    else:
        place = data()
        body = {
            "machine": describe_environment(DistributedEnvironment.single_process()),
            "rounds": given.pairs,
            "jpeg": table(rates({n: make(place, given.images) for n, make in JPEG.items()}, given.pairs), "timm"),
            "memory": table(rates(memory_contenders(place, 4_000), given.pairs), "DataLoader"),
            "forms": data_forms.rates(place, given.images, given.pairs),
            "reads": data_forms.reads(place, given.pairs),
            "kept": kept(place),
            "start_up": start_up(),
        }
        show(body)
    if given.json:
        given.json.write_text(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()

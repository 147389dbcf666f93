"""Loaders on this machine's cores: images/s of each backend, and how long a real scoring epoch waits for images."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu_parts.common import Row, synthetic, wait
from benchmarks.gpu_parts.scoring import MICRO, SIZE, bench_of
from dist_prune import methods
from dist_prune.data.datasets import FolderSource, open_source
from dist_prune.data.ffcv.backend import import_loader
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.distributed.environment import cores
from dist_prune.errors import PruneError

LOOK = TransformConfig(SIZE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
IMAGES = {"cpu": 16, "cuda": 4096}


def folder_of(place: Path, images: int) -> FolderSource:
    """JPEG files of 256 pixels in ten classes."""
    source = synthetic(images, 256, 10)
    for number, (pixels, label) in enumerate(zip(source.images, source.labels, strict=True)):
        file = place / "train" / f"{label:02}" / f"{number:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file, quality=90)
    found = open_source("imagefolder", str(place), "train", True)
    assert isinstance(found, FolderSource)
    return found


def epoch(feed: ImageLoader, ids: np.ndarray, device: torch.device) -> float:
    """Images per second of the images alone."""
    wait(device)
    start = time.perf_counter()
    for _ in feed.batches([ids[at : at + MICRO] for at in range(0, len(ids), MICRO)]):
        pass
    wait(device)
    return len(ids) / (time.perf_counter() - start)


def rows(device: torch.device, seconds: float) -> Iterator[Row]:
    """Files through the torch backend, arrays on the device, and the share of a graph scoring epoch spent waiting."""
    images, workers = IMAGES["cuda" if device.type == "cuda" else "cpu"], max(1, cores() - 2)
    with tempfile.TemporaryDirectory() as name:
        source = folder_of(Path(name), images)
        ids = np.arange(images)
        feed = ImageLoader(source, LOOK, device, workers=workers)
        epoch(feed, ids[: images // 4], device)  # the workers start
        yield {"what": f"JPEG files, torch backend, {workers} workers", "images_per_s": round(epoch(feed, ids, device))}
        bench = bench_of(device, "fp32", 8)
        bench.loader, bench.ids = ImageLoader(source, LOOK, device, workers=workers), ids
        bench.model(next(bench.loader.batches([ids[:8]])).images)
        waited, plain = [0.0], bench.loader.batches

        def timed(*asked, **keys):
            batches = plain(*asked, **keys)
            while True:
                before = time.perf_counter()
                batch = next(batches, None)
                waited[0] += time.perf_counter() - before
                if batch is None:
                    return
                yield batch

        bench.loader.batches = timed  # type: ignore[method-assign]
        kind = methods.find("graph")
        start = time.perf_counter()
        kind(kind.Options()).score(bench)
        whole = time.perf_counter() - start
        yield {"what": f"graph scoring epoch from JPEG files, fp32, {workers} workers",
               "images_per_s": round(images / whole), "data_wait_share": round(waited[0] / whole, 3)}  # fmt: skip
        feed.close()
    memory = ImageLoader(synthetic(min(images, 2048), SIZE, 10), LOOK, device)
    epoch(memory, np.arange(len(memory)), device)
    yield {"what": "arrays on the device", "images_per_s": round(epoch(memory, np.arange(len(memory)), device))}
    try:
        import_loader()
        yield {"what": "ffcv", "result": "installed: python benchmarks/data.py measures it"}
    except PruneError as error:
        yield {"what": "ffcv", "failed": str(error).splitlines()[0][:200]}

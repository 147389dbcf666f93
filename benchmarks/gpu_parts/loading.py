"""Loaders on this machine's cores: images/s of each backend, and how long a real scoring epoch waits for images."""

import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.gpu_parts.common import Row, synthetic, wait, within
from benchmarks.gpu_parts.scoring import MICRO, bench_of, network_of
from dist_prune import methods
from dist_prune.data.datasets import FolderSource, open_source
from dist_prune.data.ffcv.backend import import_loader, open_beton
from dist_prune.data.ffcv.encoder import Settings
from dist_prune.data.ffcv.writer import write_beton
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.distributed.environment import cores
from dist_prune.errors import PruneError

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


def look_of(device: torch.device) -> TransformConfig:
    return TransformConfig(network_of(device)[1], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def files(source: FolderSource, device: torch.device, what: str, workers: int) -> Iterator[Row]:
    """JPEG files, decoded by workers."""
    ids = np.arange(len(source.labels))
    feed = ImageLoader(source, look_of(device), device, workers=workers)
    epoch(feed, ids[: len(ids) // 4], device)  # the workers start
    yield {"what": what, "images_per_s": round(epoch(feed, ids, device))}
    feed.close()


def silent(done: int, total: int) -> tqdm:
    """A progress bar that shows nothing."""
    return tqdm(initial=done, total=total, disable=True)


def beton(source: FolderSource, device: torch.device, what: str, workers: int) -> Iterator[Row]:
    """The same images in a .beton (JPEG, 256 pixels), read by FFCV's threads, where it is installed."""
    try:
        import_loader()
    except PruneError as error:
        yield {"what": what, "missing": str(error).splitlines()[0][:200]}
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "train.beton")
        write_beton(source, {}, file, Settings(256, 90, "jpg"), workers, lambda text: None, silent)
        feed = ImageLoader(open_beton(file), look_of(device), device, workers=workers)
        ids = np.arange(len(source.labels))
        start = time.perf_counter()
        epoch(feed, ids[:MICRO], device)
        compiled = time.perf_counter() - start
        yield {"what": what, "images_per_s": round(epoch(feed, ids, device)), "first_batch_s": round(compiled, 1)}
        feed.close()


def waiting(source: FolderSource, device: torch.device, what: str, workers: int) -> Iterator[Row]:
    """The share of a graph scoring epoch that waits for images."""
    ids = np.arange(len(source.labels))
    bench = bench_of(device, "fp32", 8)
    bench.loader, bench.ids = ImageLoader(source, look_of(device), device, workers=workers), ids
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
    yield {"what": what, "images_per_s": round(len(ids) / whole), "data_wait_share": round(waited[0] / whole, 3)}
    bench.loader.close()


def arrays(device: torch.device, what: str, images: int) -> Iterator[Row]:
    """Arrays on the device."""
    look = look_of(device)
    memory = ImageLoader(synthetic(images, network_of(device)[1], 10), look, device)
    epoch(memory, np.arange(images), device)
    yield {"what": what, "images_per_s": round(epoch(memory, np.arange(images), device))}


def rows(device: torch.device, seconds: float, done: Collection[str] = ()) -> Iterator[Row]:
    """Files through each backend, the wait of a scoring epoch, arrays on the device."""
    images, workers = IMAGES["cuda" if device.type == "cuda" else "cpu"], max(1, cores() - 2)
    parts = {
        f"JPEG files, torch backend, {workers} workers": files,
        f"graph scoring epoch from JPEG files, fp32, {workers} workers": waiting,
        f"JPEG in a .beton, ffcv backend, {workers} threads": beton,
    }
    left = {what: part for what, part in parts.items() if what not in done}
    with tempfile.TemporaryDirectory() as name:
        source = folder_of(Path(name), images) if left else None
        for what, part in left.items():
            assert source is not None
            yield from within(part(source, device, what, workers), what, seconds)
    what = "arrays on the device"
    if what not in done:
        yield from within(arrays(device, what, min(images, 2048)), what, seconds)

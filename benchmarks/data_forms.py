"""The parts of benchmarks/data.py about decoders and forms of storage: images/s of one core, and reads from the disk.

All work is in this process on one thread, and rates are images per second of its processor time: what one core gives
to a loader, whatever else the machine does. Reads after the cache was emptied are timed by the clock. The cache is
emptied file by file (posix_fadvise), which needs no rights and leaves other programs' files alone; the entries of
folders stay cached, which favours many small files.

The photographs at hand have 256 pixels a side, where a resize costs as much as decoding. ImageNet's own are larger, so
the decoders also read the same photographs enlarged to 400 pixels, about the mean side of ImageNet's.
"""

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader

from dist_prune.cli.main import main
from dist_prune.data.datasets import ArraySource, open_source
from dist_prune.data.decoders import decode
from dist_prune.data.ffcv.backend import open_beton
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.sampling import micro_batches
from dist_prune.errors import PruneError

CPU, BATCH, SIDE, LARGE = torch.device("cpu"), 50, 224, 400
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = ("warm", "cold", "warm epoch", "cold epoch")  # reads alone; reads, decoding and augmentation
Contender = Callable[[int], int]  # epoch -> images


def _decoders() -> list[str]:
    try:
        import simplejpeg  # noqa: F401
    except ImportError:
        return ["pillow", "torchvision"]
    return ["pillow", "torchvision", "simplejpeg"]


def _epochs(
    source: Any, count: int, decoder: str = "pillow", scaled: bool = False, resizer: str = "pillow"
) -> Contender:
    look = TransformConfig(
        SIDE, MEAN, STD, 0.875, augment="resized_crop_flip", decoder=decoder, dct_scaled=scaled, resizer=resizer
    )  # fmt: skip
    feed = ImageLoader(source, look, CPU, int("ffcv" in source.backends))

    def epoch(number: int) -> int:
        order = np.random.default_rng(number).permutation(count)
        return sum(len(batch.ids) for batch in feed.batches(micro_batches(order, BATCH), (0, number)))

    return epoch


def _decoding(contents: list[bytes], decoder: str) -> Contender:
    """A bare loop: bytes of a file -> RGB pixels as an array, which is what a loader's next step reads."""

    def epoch(number: int) -> int:
        for content in contents:
            np.asarray(decode(content, decoder=decoder).image)
        return len(contents)

    return epoch


def _enlarged(contents: list[bytes], labels: np.ndarray, folder: Path) -> Any:
    """The photographs with sides of LARGE pixels, as a folder of JPEG files."""
    for sample, content in enumerate(contents):
        place = folder / "val" / f"{labels[sample]:04d}"
        place.mkdir(parents=True, exist_ok=True)
        with Image.open(io.BytesIO(content)) as image:
            large = image.convert("RGB").resize((LARGE, LARGE), Image.Resampling.BICUBIC)
        large.save(place / f"{sample:06d}.jpg", quality=90)
    return open_source("imagefolder", str(folder), "val", False)


def _timm(folder: Path, count: int) -> Contender:
    images = ImageDataset(str(folder))
    chosen: Any = torch.utils.data.Subset(images, range(count))
    loader = create_loader(
        chosen, (3, SIDE, SIDE), BATCH, is_training=True, color_jitter=None, interpolation="bilinear", mean=MEAN,
        std=STD, num_workers=0, device=CPU, persistent_workers=False,
    )  # type: ignore[arg-type] # fmt: skip
    images.transform = chosen.transform
    return lambda number: sum(len(labels) for _, labels in loader)


def _made(source: Any, root: Path, folder: Path) -> dict[str, Any]:
    """The same images as tar shards, as .beton files and as arrays of 256 x 256 pixels."""
    forms: dict[str, Any] = {}
    with redirect_stderr(io.StringIO()):  # progress bars
        words = ["--source", str(root), "--split", "eval"]
        assert main(["pack", *words, "--out", str(folder / "tar"), "--name", "images"]) == 0
        forms["tar"] = open_source("tar", str(folder / "tar"), "val", False)
        for mode in ("jpg", "raw"):
            out = folder / f"{mode}.beton"
            options = ["--write-mode", mode, "--max-resolution", "512", "--quality", "90", "--out", str(out)]
            try:
                assert main(["make-ffcv", *words, *options]) == 0
                forms[f"beton, {mode}"] = open_beton(out)
            except (PruneError, AssertionError):  # no ffcv here
                break
    whole = ImageLoader(source, TransformConfig(256, (0.0,) * 3, (1 / 255,) * 3), CPU)
    batches = whole.batches(micro_batches(np.arange(len(source.labels)), BATCH))
    pixels = torch.cat([batch.images.round().to(torch.uint8) for batch in batches]).permute(0, 2, 3, 1)
    forms["memory"] = ArraySource(np.ascontiguousarray(pixels.numpy()), source.labels, source.classes)
    return forms


def rates(place: Path, count: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Images per second of one core, contenders in turns, and each one's ratio to Pillow from the folder."""
    root = place / "imagenet_1000"
    source = open_source("imagefolder", str(root), "val", False)
    contents = [source.fetch(sample).read_bytes() for sample in range(count)]  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        forms = _made(source, root, Path(folder))
        contenders: dict[str, Contender] = {f"decode alone, {name}": _decoding(contents, name) for name in _decoders()}
        contenders["timm's loader"] = _timm(root / "val", count)
        for name in _decoders():
            contenders[f"folder, {name}"] = _epochs(source, count, name)
            contenders[f"tar, {name}"] = _epochs(forms["tar"], count, name)
        contenders["folder, pillow, dct_scaled"] = _epochs(source, count, "pillow", True)
        large = _enlarged(contents, source.labels, Path(folder) / "large")
        for name in _decoders():
            contenders[f"{LARGE} pixels, {name}"] = _epochs(large, count, name)
            contenders[f"folder, {name}, torch"] = _epochs(source, count, name, resizer="torch")
            contenders[f"{LARGE} pixels, {name}, torch"] = _epochs(large, count, name, resizer="torch")
        contenders |= {name: _epochs(form, count) for name, form in forms.items() if name != "tar"}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(rounds + 1):
            for name, epoch in contenders.items():
                start = time.process_time()
                done = epoch(number)
                if number:  # the first one compiles and fills caches
                    seconds[name].append((time.process_time() - start) / done)
    pairs = {name: "decode alone, pillow" if name.startswith("decode") else "folder, pillow" for name in contenders}
    pairs |= {f"tar, {name}": f"folder, {name}" for name in _decoders()}
    pairs |= {name: f"{LARGE} pixels, pillow" for name in contenders if name.startswith(f"{LARGE} pixels")}
    return {
        name: {
            "images_per_s": 1 / statistics.median(values),
            "against": pairs[name],
            "ratio": statistics.median(b / a for a, b in zip(values, seconds[pairs[name]], strict=True)),
        }
        for name, values in seconds.items()
    }


def _forget(paths: list[Path]) -> None:
    """Empty the cache of files' contents."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def reads(place: Path, rounds: int) -> dict[str, Any]:
    """Files against one tar, in the same random order: reads of all, and epochs that decode them; seconds."""
    from dist_prune.data import tar_shards

    root = place / "imagenet_1000"
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / "val"  # on the disk of the tar
        files = open_source("imagefolder", str(root), "val", False)
        for sample in range(len(files.labels)):
            original = files.fetch(sample)
            assert isinstance(original, Path)
            copy = copied / original.relative_to(root / "val")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(original.read_bytes())
        with redirect_stderr(io.StringIO()):
            assert main(["pack", "--source", folder, "--split", "eval", "--out", f"{folder}/tar", "--name", "i"]) == 0
        files = open_source("imagefolder", folder, "val", False)
        tar: Any = open_source("tar", f"{folder}/tar", "val", False)
        paths: list[Path] = [files.fetch(sample) for sample in range(len(files.labels))]  # type: ignore[misc]
        shards = [Path(shard) for shard in tar.index.shards]
        epochs = {"files": _epochs(files, len(paths)), "tar": _epochs(tar, len(paths))}
        readers = {"files": lambda sample: paths[sample].read_bytes(), "tar": tar.fetch}
        found: dict[str, list[float]] = {f"{kind}, {name}": [] for kind in KINDS for name in readers}
        for number in range(rounds + 1):
            order = np.random.default_rng(number).permutation(len(paths)).tolist()
            for kind in KINDS:
                for name, read in readers.items():
                    if kind.startswith("cold"):
                        _forget(paths if name == "files" else shards)
                        tar_shards._open.clear()
                    start = time.perf_counter()
                    if kind.endswith("epoch"):
                        epochs[name](number)
                    else:
                        for sample in order:
                            read(sample)
                    if number:
                        found[f"{kind}, {name}"].append(time.perf_counter() - start)
        out["images"], out["bytes"] = len(paths), sum(path.stat().st_size for path in paths)
        out["disk"] = _file_system(Path(folder))
    for kind in KINDS:
        pairs = list(zip(found[f"{kind}, files"], found[f"{kind}, tar"], strict=True))
        out[kind] = {
            "files_s": statistics.median(a for a, _ in pairs),
            "tar_s": statistics.median(b for _, b in pairs),
            "ratio": statistics.median(a / b for a, b in pairs),
        }
    return out


def _file_system(folder: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    return max((point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point))[1]


def show(body: dict[str, Any]) -> None:
    """Print both tables."""
    print("\nimages/s of one core (bounds: tar 0.97x the folder, the best decoder 1.15x Pillow)")
    for name, row in body["forms"].items():
        print(f"  {name:30} {row['images_per_s']:9.1f} images/s  {row['ratio']:5.2f}x {row['against']}")
    found = body["reads"]
    print(
        f"\n{found['images']:,} files against one tar of {found['bytes'] / 1e6:.0f} MB, a local disk ({found['disk']})"
    )
    for kind in KINDS:
        row = found[kind]
        print(
            f"  {kind}: files {row['files_s']:.3f} s, tar {row['tar_s']:.3f} s: the tar is {row['ratio']:.2f}x as fast"
        )

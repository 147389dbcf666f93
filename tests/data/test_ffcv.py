"""The FFCV backend on real images and real ranks: exact, the same pixels as the other backends, nothing left behind."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dist_prune.data.augment import crop_window, window_uniforms
from dist_prune.data.datasets import ArraySource, open_source
from dist_prune.data.ffcv.backend import FfcvSource, digest, open_beton, sidecar_of
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.open_split import open_split
from dist_prune.data.sampling import micro_batches, shard
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError

CPU = torch.device("cpu")
PLAIN = TransformConfig(32, (0.0,) * 3, (1.0,) * 3)
FEEDS: dict[Path, ImageLoader] = {}  # of a rank of the pool: one pipeline for all worlds


class Silent:
    def __init__(self, *_: int):
        pass

    def update(self, _: int) -> None:
        pass

    def close(self) -> None:
        pass


def write(
    source, out: Path, workers: int = 1, resolution: int = 512, mode: str = "raw", said: list | None = None
) -> Path:
    from dist_prune.data.ffcv.encoder import Settings
    from dist_prune.data.ffcv.writer import write_beton

    say = said.append if said is not None else lambda text: None
    write_beton(source, {}, out, Settings(resolution, 90, mode), workers, say, Silent)
    return out


@pytest.fixture(scope="session")
def cifar(data) -> ArraySource:
    whole = open_source("npz", str(data / "cifar10.npz"), "", True)
    return ArraySource(whole.images[:1001], whole.labels[:1001], whole.classes)


@pytest.fixture(scope="session")
def betons(ffcv, cifar, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("betons")
    return {mode: write(cifar, folder / f"{mode}.beton", mode=mode) for mode in ("raw", "jpg")}


@pytest.fixture(scope="session")
def photos(ffcv, data, tmp_path_factory) -> tuple[Path, Path]:
    """An image folder of 60 real photographs and a raw .beton of them beside it."""
    root = tmp_path_factory.mktemp("photos")
    for folder in sorted((data / "imagenet_1000/val").iterdir())[::17][:60]:
        shutil.copytree(folder, root / "val" / folder.name)
    return root, write(open_source("imagefolder", str(root), "val", False), root / "val.beton", resolution=4096)


def seen(feed: ImageLoader, ranks: Communicator, orders: list[np.ndarray]) -> list[list[tuple[int, int, int]]]:
    """For each epoch (sample id, label, sum of its pixels) of this rank's images."""
    out = []
    for order in orders:
        found = []
        for batch in feed.batches(shard(micro_batches(order, 100), ranks.rank, ranks.world)):
            sums = (batch.images * 255).round().long().sum((1, 2, 3))
            found += list(zip(batch.ids.tolist(), batch.labels.tolist(), sums.tolist(), strict=True))
        out.append(found)
    return out


def served(ranks: Communicator, files: list[Path], orders: list[np.ndarray]) -> list[list[list[tuple[int, int, int]]]]:
    for file in files:
        FEEDS.setdefault(file, ImageLoader(open_beton(file), PLAIN, CPU, workers=1))
    return [seen(FEEDS[file], ranks, orders) for file in files]


def test_every_image_once_on_every_rank_in_every_epoch(pool, betons, cifar):
    """The contract of all backends: 1,001 images, worlds 1 to 3, two epochs in different orders, a ragged end."""
    orders = [np.arange(1001), np.random.default_rng(7).permutation(1001)]
    plain = {
        sample: (label, total)
        for sample, label, total in seen(ImageLoader(cifar, PLAIN, CPU), Communicator(), orders[:1])[0]
    }
    lossy: list[dict[int, int]] = []
    for world in (1, 2, 3):
        ranks = pool.run(world, served, [betons["raw"], betons["jpg"]], orders)
        for epoch in range(2):
            raw, jpg = ([row for found in ranks for row in found[file][epoch]] for file in (0, 1))
            assert sorted(sample for sample, _, _ in raw) == list(range(1001))
            assert {sample: (label, total) for sample, label, total in raw} == plain
            assert sorted((sample, label) for sample, label, _ in jpg) == sorted(
                (s, label) for s, (label, _) in plain.items()
            )
            lossy.append({sample: total for sample, _, total in jpg})
    assert all(found == lossy[0] for found in lossy)
    off = [abs(lossy[0][sample] - total) / total for sample, (_, total) in plain.items() if total > 10_000]
    assert np.median(off) < 0.01


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_photographs_are_those_of_the_torch_backend(photos, interpolation):
    """Evaluation look and training windows, bit for bit, in any order, with repeats, over lists of any length."""
    root, beton = photos
    folder, found = open_source("imagefolder", str(root), "val", False), open_beton(beton)
    lists = [np.array([3, 3, 58]), np.array([], dtype=np.int64), np.arange(33)[::-1], np.array([17])]
    for look, moment in (
        (TransformConfig(96, (0.5,) * 3, (0.5,) * 3, 0.875, interpolation), None),
        (TransformConfig(64, (0.5,) * 3, (0.5,) * 3, 1.0, interpolation, "resized_crop_flip"), (5, 2)),
        (TransformConfig(64, (0.5,) * 3, (0.5,) * 3, 1.0, interpolation, "crop_flip"), (5, 3)),
    ):
        for one, other in zip(
            ImageLoader(found, look, CPU, workers=2).batches(lists, moment),
            ImageLoader(folder, look, CPU, workers=0).batches(lists, moment),
            strict=True,
        ):
            assert torch.equal(one.ids, other.ids)
            assert torch.equal(one.labels, other.labels)
            assert torch.equal(one.images, other.images)


@pytest.mark.parametrize("augment", ["crop_flip", "resized_crop_flip"])
def test_arrays_are_those_of_the_memory_backend(betons, cifar, augment):
    look = TransformConfig(48, (0.5,) * 3, (0.5,) * 3, augment=augment)
    lists = [np.array([1000, 4, 9]), np.arange(40)]
    pairs = zip(
        ImageLoader(open_beton(betons["raw"]), look, CPU).batches(lists, (1, 4)),
        ImageLoader(cifar, look, CPU).batches(lists, (1, 4)),
        strict=True,
    )
    assert all(torch.equal(one.images, other.images) for one, other in pairs)


def test_windows_are_those_that_the_other_backends_draw():
    resample = pytest.importorskip("dist_prune.data.ffcv.pillow_resize")
    ids = np.arange(4000)
    sides = np.random.default_rng(0).integers(1, 500, (4000, 2))
    chances = window_uniforms((3, 1), ids)
    for scale, ratio in (((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (1.9, 2.0))):
        found = resample.random_windows(sides, np.array(chances), scale, ratio, 224)
        for row, (height, width), chance in zip(found, sides.tolist(), chances, strict=True):
            assert tuple(row[:4]) == crop_window(height, width, chance, scale, ratio)
            assert tuple(row[4:]) == (224, 224, 0, 0, chance[-1] < 0.5)


def test_one_channel_stays_one_channel(ffcv, tmp_path):
    digits = open_source("digits", None, "", False)
    found = open_beton(write(digits, tmp_path / "digits.beton"))
    ids = [np.array([5, 100])]
    look = TransformConfig(8, (0.5,), (0.5,))
    one, other = (next(ImageLoader(source, look, CPU).batches(ids)) for source in (found, digits))
    assert one.images.shape == (2, 1, 8, 8)
    assert torch.equal(one.images, other.images)


def test_threads_and_memory_stay_flat(betons):
    """20 epochs, 20 loaders made and abandoned in the middle, and torch's own number of threads is left alone."""
    source, lists, process = open_beton(betons["jpg"]), micro_batches(np.arange(1001), 50), psutil.Process()

    def grown(act) -> float:
        for _ in range(3):
            act()
        before = process.memory_info().rss, threading.active_count(), process.num_threads()
        for _ in range(20):
            act()
        assert threading.active_count() == before[1]
        until = time.monotonic() + 5  # the system may need a moment to bury them
        while process.num_threads() > before[2] and time.monotonic() < until:
            time.sleep(0.01)
        assert process.num_threads() <= before[2]
        return (process.memory_info().rss - before[0]) / 2**20

    feed = ImageLoader(source, PLAIN, CPU, workers=2)
    assert grown(lambda: sum(len(batch.ids) for batch in feed.batches(lists))) < 15

    def abandon() -> None:
        batches = ImageLoader(source, PLAIN, CPU, workers=3).batches(lists)
        next(batches)
        next(batches)

    assert grown(abandon) < 15
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    list(feed.batches(lists[:3]))
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), found) == (2, [2])
    torch.set_num_threads(before)


def test_a_failing_thread_is_an_error_not_a_wait(ffcv, betons):
    source = open_beton(betons["raw"])
    stream = ffcv.stream_of(source.path, source.identity, 32)
    with pytest.raises(RuntimeError, match="ended early") as caught:
        list(stream.chunks(np.arange(40), (source.items,), 2, 32))
    assert caught.value.__cause__ is not None


def test_an_image_that_cannot_be_decoded_is_named(betons, tmp_path):
    """Damaged in a way that no digest tells: written again after the damage, as a broken writer would."""
    path = tmp_path / "x.beton"
    shutil.copy(betons["jpg"], path)
    facts = json.loads(sidecar_of(betons["jpg"]).read_text())
    place = int(open_beton(betons["jpg"]).items[7, 0])
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"no JPEG here")
    sidecar_of(path).write_text(json.dumps(facts | {"sha256": digest(path)}))
    batches = ImageLoader(open_beton(path), PLAIN, CPU, workers=2).batches(micro_batches(np.arange(100), 5))
    with pytest.raises(PruneError, match=r"sample 7: its image in .*x\.beton cannot be decoded"):
        list(batches)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path, side: side.unlink(), "has no sidecar"),
        (lambda path, side: path.unlink(), "there is no"),
        (lambda path, side: os.truncate(path, path.stat().st_size - 100), "cut short or replaced"),
        (lambda path, side: flip(path, path.stat().st_size // 2), "its digest differs"),
        (lambda path, side: edit(side, classes=["a", "b", "c"]), r"sidecar says 1001 images of 3 classes"),
        (lambda path, side: edit(side, count=7), "sidecar says 7 images"),
        (lambda path, side: edit(side, format=99), "has format 99, this version reads 1"),
        (lambda path, side: side.write_text("{"), "cannot be read"),
    ],
)
def test_files_that_are_not_what_they_say(betons, tmp_path, damage, said):
    path = tmp_path / "x.beton"
    shutil.copy(betons["raw"], path)
    shutil.copy(sidecar_of(betons["raw"]), sidecar_of(path))
    damage(path, sidecar_of(path))
    with pytest.raises(PruneError, match=said):
        open_beton(path)


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def edit(side: Path, **changes: object) -> None:
    side.write_text(json.dumps(json.loads(side.read_text()) | changes))


def test_large_files_are_known_by_their_index(betons, tmp_path, monkeypatch):
    monkeypatch.setattr("dist_prune.data.ffcv.backend.READ_WHOLE", 1)
    assert len(open_beton(betons["raw"]).labels) == 1001
    path = tmp_path / "x.beton"
    shutil.copy(betons["raw"], path)
    shutil.copy(sidecar_of(betons["raw"]), sidecar_of(path))
    flip(path, 3000)  # among the records of the samples
    with pytest.raises(PruneError, match="its digest differs"):
        open_beton(path)


def test_auto_takes_a_matching_file_and_says_why(photos, tmp_path):
    root, beton = photos
    found = open_split("auto", "imagefolder", str(root), "val", False)
    assert (found.backend, type(found.source)) == ("ffcv", FfcvSource)
    assert "holds the same images" in found.why
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in (beton, sidecar_of(beton)):
        shutil.copy(file, alone)
    assert open_split("auto", "imagefolder", str(alone), "val", False).backend == "ffcv"
    shutil.copytree(root, tmp_path / "other")
    Image.new("RGB", (9, 9)).save(next((tmp_path / "other/val").iterdir()) / "zzz.png")
    other = open_split("auto", "imagefolder", str(tmp_path / "other"), "val", False)
    assert other.backend == "torch"
    assert "made from other images" in other.why
    with pytest.raises(PruneError, match=r"made from other images.*make-ffcv"):
        open_split("ffcv", "imagefolder", str(tmp_path / "other"), "val", False)
    with pytest.raises(PruneError, match=r"there is no .*train\.beton; write it with: dist-prune make-ffcv"):
        open_split("ffcv", "imagefolder", str(root), "train", True)


def test_auto_evaluates_on_the_images_themselves(photos, tmp_path):
    """A lossy .beton serves training, evaluation only where it is asked for by name; and none that is too small."""
    root, source = tmp_path / "photos", open_source("imagefolder", str(photos[0]), "val", False)
    root.mkdir()
    (root / "val").symlink_to(photos[0] / "val")
    place = write(source, root / "val.beton", mode="jpg", resolution=100)

    def opened(backend: str, train: bool, side: int = 90):
        return open_split(backend, "imagefolder", str(root), "val", train, resized=lambda source: side)

    found = opened("auto", False)
    assert (found.backend, found.source.identity) == ("torch", source.identity)
    assert "keeps 59 of 59 as JPEG of quality 90 and 59 shrunk to 100 pixels; data.backend=ffcv evaluates" in found.why
    for found in (opened("ffcv", False), opened("auto", True)):
        assert found.backend == "ffcv"
        assert found.source.identity == f"{source.identity}:{digest(place)}"
        assert "it keeps 59 of 59 as JPEG" in found.why
        assert "shrunk ones are blown up to 90 pixels again" in found.why
    assert "blown up" not in opened("ffcv", False, 10).why
    with pytest.raises(PruneError, match=r"written with --max-resolution 100, .* shorter sides to 101 pixels"):
        opened("ffcv", False, 101)
    assert opened("auto", True, 101).backend == "torch"
    shutil.copy(photos[1], place)
    shutil.copy(sidecar_of(photos[1]), sidecar_of(place))
    whole = opened("auto", False, 5000)
    assert (whole.backend, whole.source.identity) == ("ffcv", source.identity), "small, but whole"


@pytest.mark.parametrize("older", [False, True])
def test_a_writing_that_is_stopped_in_its_last_steps_goes_on(ffcv, tmp_path, monkeypatch, older):
    """Killed before the file has its name, or before its sidecar has: on the disk lies what a kill there leaves."""
    digits = open_source("digits", None, "", False)
    truth, real = digest(write(digits, tmp_path / "truth.beton")), os.replace
    for stop in (".beton", ".json"):
        out = tmp_path / f"x{stop}" / "x.beton"
        if older:
            write(digits, out, mode="jpg")

        def killed(source: Path, target: Path, stop: str = stop) -> None:
            if target.name == ("x.beton" if stop == ".beton" else "x.beton.json"):
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(digits, out)
        monkeypatch.setattr(os, "replace", real)
        with pytest.raises(PruneError, match=r"has no sidecar|there is no"):
            open_beton(out)
        said: list[str] = []
        write(digits, out, said=said)
        assert any(line.startswith("goes on after 450") or "all but its sidecar" in line for line in said), said
        assert digest(out) == truth
        assert len(open_beton(out).labels) == 450
        assert sorted(path.name for path in out.parent.iterdir()) == ["x.beton", "x.beton.json"]
    sidecar_of(out).unlink()
    with pytest.raises(PruneError, match="exists and has no sidecar"):
        write(digits, out)


def test_a_full_disk_at_the_end_is_an_error_for_people(ffcv, tmp_path):
    """The last bytes do not fit (a real limit of the file's size); with more room the same command goes on."""
    digits = open_source("digits", None, "", False)
    truth = write(digits, tmp_path / "truth.beton")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (truth.stat().st_size - 1, hard))
    try:
        with pytest.raises(PruneError, match=r"x\.beton\.part cannot be written: .*run the same command again"):
            write(digits, tmp_path / "x.beton")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert digest(write(digits, tmp_path / "x.beton")) == digest(truth)


@pytest.mark.slow
def test_the_file_is_the_same_for_any_number_of_workers_and_goes_on_after_a_kill(ffcv, data, tmp_path):
    """A writer killed with SIGKILL leaves nothing under the file's name; the same command goes on to the same bytes."""
    root = tmp_path / "images"
    for number in range(2):  # 2,000 entries, 1,000 images
        for folder in (data / "imagenet_1000/val").iterdir():
            (root / f"{number}_{folder.name}").mkdir(parents=True)
            for file in folder.iterdir():
                os.link(file, root / f"{number}_{folder.name}" / file.name)
    out = tmp_path / "x.beton"
    command = [sys.executable, "-m", "dist_prune.cli", "make-ffcv", "--source", str(root), "--max-resolution", "64"]
    process = subprocess.Popen([*command, "--out", str(out), "--workers", "2"], stderr=subprocess.DEVNULL)
    rows = tmp_path / "x.beton.part.rows"
    until = time.monotonic() + 120
    while not (rows.is_file() and rows.stat().st_size) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert not psutil.wait_procs(workers, timeout=30)[1], "workers outlived the writer"
    assert rows.is_file(), "the writer ended before it could be killed"
    assert not out.exists()
    said: list[str] = []
    source = open_source("imagefolder", str(tmp_path), "images", True)
    write(source, out, 1, 64, "jpg", said)
    assert any("goes on after" in line for line in said), said
    assert not list(tmp_path.glob("x.beton.part*"))
    assert digest(out) == digest(write(source, tmp_path / "y.beton", 3, 64, "jpg"))
    write(source, out, 1, 64, "jpg", said)
    assert "is whole already" in said[-1]
    flip(out, 3 << 20)
    write(source, out, 1, 64, "jpg", said)
    assert any("written anew" in line for line in said)
    assert digest(out) == digest(tmp_path / "y.beton")

"""Image files as they are found in the wild: strange modes, damage, files that go away; and the index of a folder."""

import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dist_prune.data import folder_index
from dist_prune.data.datasets import open_source
from dist_prune.data.decoders import read_image
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.sampling import micro_batches
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.training.evaluation import evaluate
from dist_prune.training.tracking import Tracker

CPU, LOOK = torch.device("cpu"), TransformConfig(16, (0.5,) * 3, (0.5,) * 3)
RNG = np.random.default_rng(0)
PIXELS = np.kron(RNG.integers(0, 256, (4, 5, 3), np.uint8), np.ones((8, 8, 1), np.uint8))  # (32, 40, 3) in flat tiles


def upright(path, exif: bool = True) -> np.ndarray:
    return np.asarray(read_image(path, exif)).astype(int)


def test_modes_become_rgb(tmp_path):
    image = Image.fromarray(PIXELS)
    gray = np.asarray(image.convert("L")).astype(int)
    for mode, kind in (("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("1", "png"), ("LA", "png")):
        path = tmp_path / f"{mode}.{kind}"
        image.convert(mode).save(path, **({"quality": 100} if kind == "jpg" else {}))
        found = upright(path)
        assert found.shape == (32, 40, 3)
        wanted = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert np.array_equal(found, wanted)
        if mode in ("L", "LA"):
            assert np.array_equal(found[..., 0], gray)
        if mode in ("RGBA", "CMYK"):
            assert np.abs(found - PIXELS).mean() < 8
    Image.fromarray(PIXELS).quantize(16).save(tmp_path / "t.png", transparency=bytes(16))
    assert upright(tmp_path / "t.png").shape == (32, 40, 3)


def test_sixteen_bits_keep_their_upper_half(tmp_path):
    """Pillow's own conversion would clip them to white."""
    deep = (np.arange(32 * 40, dtype=np.uint32).reshape(32, 40) * 51).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    for name in ("deep.png", "deep.tif"):
        assert np.array_equal(upright(tmp_path / name)[..., 0], deep >> 8)


@pytest.mark.parametrize(("kind", "pixels"), [("F", np.float32(0.5)), ("I", np.int32(-3))])
def test_pixels_without_a_meaning_in_8_bits_are_refused(tmp_path, kind, pixels):
    Image.fromarray(np.full((8, 8), pixels)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="its pixels"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_photographs_are_turned_upright(tmp_path, kind, orientation):
    """Each of the eight EXIF orientations of the same photograph reads as the same pixels."""
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = Image.fromarray(PIXELS)
    stored = stored.transpose(turns[orientation]) if orientation in turns else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{kind}"
    more = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
    stored.save(path, exif=exif, **more)
    assert np.abs(upright(path) - PIXELS).mean() < 2
    if orientation == 6 and kind != "tif":  # Pillow itself turns TIFF files
        assert upright(path, exif=False).shape == (40, 32, 3)


@pytest.fixture
def folder(tmp_path):
    """Nine images in three classes, three of them unreadable: cut short, no image at all, gone."""
    for number in range(9):
        place = tmp_path / "train" / "abc"[number // 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (20, 24, 3), np.uint8)).save(place / f"{number}.png")
    source = open_source("imagefolder", str(tmp_path), "train", True)
    whole = (tmp_path / "train/a/1.png").read_bytes()
    (tmp_path / "train/a/1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train/b/4.png").write_text("this is no image")
    (tmp_path / "train/c/8.png").unlink()
    return source


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([0, 1], r"sample 1: the image .*1\.png cannot be decoded: .*truncated"),
        ([4, 0], r"sample 4: .*b/4\.png cannot be decoded: cannot identify image file"),
        ([2, 8], r"sample 8: .*c/8\.png cannot be decoded: it no longer exists.*data.on_error=skip"),
    ],
)
def test_an_unreadable_image_ends_the_run_and_is_named(folder, ids, said, workers):
    feed = ImageLoader(folder, LOOK, CPU, workers)
    with pytest.raises(PruneError, match=said):
        list(feed.batches([np.array([0]), np.array(ids)]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", [None, (0, 0)])
def test_unreadable_images_are_left_out_and_noted(folder, workers, augment):
    look = TransformConfig(16, (0.5,) * 3, (0.5,) * 3, augment="resized_crop_flip")
    skipping, failing = ImageLoader(folder, look, CPU, workers, on_error="skip"), ImageLoader(folder, look, CPU)
    found = list(skipping.batches([np.array([0, 1, 2]), np.array([8, 7, 4, 5])], augment))
    assert [batch.ids.tolist() for batch in found] == [[0, 2], [7, 5]]
    assert [batch.labels.tolist() for batch in found] == [[0, 0], [2, 1]]
    wanted = next(failing.batches([np.array([7, 5])], augment)).images
    assert torch.equal(found[1].images, wanted), "the others keep their own pixels"
    assert sorted(skipping.skipped) == [1, 4, 8]
    assert "truncated" in skipping.skipped[1]


def test_nothing_readable_in_a_training_batch_is_an_error(folder):
    feed = ImageLoader(folder, LOOK, CPU, on_error="skip")
    assert len(next(feed.batches([np.array([1, 4])])).ids) == 0
    with pytest.raises(PruneError, match="none of the 2 images of a training batch could be read"):
        list(feed.batches([np.array([1, 4])], (0, 0)))


def test_a_feed_that_has_to_be_exact_leaves_nothing_out_when_scoring(folder):
    feed = ImageLoader(folder, LOOK, CPU, on_error="skip", exact=True)
    assert len(next(feed.batches([np.array([0, 1, 2])], (0, 0))).ids) == 2, "training may go on without"
    with pytest.raises(PruneError, match="sample 1 could be read when the images were checked, and cannot be read now"):
        list(feed.batches([np.array([0, 1, 2])]))


class First(torch.nn.Module):
    """Says class 0 to everything."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0, 0.0]]).expand(len(images), 3)


def counted(ranks: Communicator, source) -> tuple[dict[str, float], list[int], list[int]]:
    feed, kept = ImageLoader(source, LOOK, CPU, on_error="skip"), {}
    figures = evaluate(First(), feed, 2, ranks, Tracker(False), kept=kept)
    return figures, sorted(feed.skipped), kept["predicted"].tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_figures_are_exact_over_ranks_without_them(folder, world, pool):
    results = pool.run(world, counted, folder)
    assert [found["images"] for found, *_ in results] == [6] * world
    assert [found["top1"] for found, *_ in results] == pytest.approx([100 * 2 / 6] * world)
    assert sorted(sample for _, skipped, _ in results for sample in skipped) == [1, 4, 8]
    assert [answers for *_, answers in results] == [[0, -1, 0, 0, -1, 0, 0, 0, -1]] * world, "no answer is none"


def test_a_worker_that_dies_is_no_hang(folder, monkeypatch):
    from dist_prune.data import file_backend

    monkeypatch.setattr(file_backend, "decode", lambda *_: os._exit(9))
    began = time.monotonic()
    with pytest.raises(PruneError, match="the loader's workers are gone or stuck"):
        list(ImageLoader(folder, LOOK, CPU, 1).batches([np.array([0]), np.array([2])]))
    assert time.monotonic() - began < 60


def test_a_worker_that_delivers_nothing_is_no_hang(folder, monkeypatch):
    from dist_prune.data import file_backend

    monkeypatch.setattr(file_backend, "WORKER_TIMEOUT_S", 2)
    monkeypatch.setattr(file_backend, "decode", lambda *_: time.sleep(60))
    with pytest.raises(PruneError, match="timed out after 2"):
        list(ImageLoader(folder, LOOK, CPU, 1).batches([np.array([0]), np.array([2])]))


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def test_workers_stay_for_the_next_epoch_and_nothing_is_left_behind(folder):
    feed, me = ImageLoader(folder, LOOK, CPU, 2), psutil.Process()
    lists = micro_batches(np.array([0, 2, 3, 5, 6, 7] * 4), 2)
    list(feed.batches(lists))  # what the first use of workers starts in this process stays for good
    feed.close()
    before = settled(me)
    list(feed.batches(lists, (0, 0)))
    workers = children() - before[0]
    assert len(workers) == 2
    inner = [len(list(feed.batches(lists[:3]))) for batch in feed.batches(lists, (0, 1)) if batch.ids[0] == 0]
    assert inner == [3] * 4, "an epoch within an epoch has workers of its own"
    assert len(children() - before[0]) == 2
    for _ in range(5):
        next(feed.batches(lists))  # dropped before its end
    feed.close()
    assert settled(me) == before


def settled(process: psutil.Process) -> tuple[set[int], int, int]:
    """Children, threads and open files of a process, once none of them has ended for half a second."""
    found, seen = (set[int](), 0, 0), 0
    for _ in range(100):
        now = children(), process.num_threads(), process.num_fds()
        found, seen = now, seen + 1 if now == found else 0
        if seen == 5:
            break
        time.sleep(0.1)
    return found


LEFT = """
import sys, torch
from dist_prune.data.sampling import micro_batches
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.datasets import open_source
source = open_source("imagefolder", sys.argv[1], "train", True)
feed = ImageLoader(source, TransformConfig(16, (0.5,) * 3, (0.5,) * 3), torch.device("cpu"), 1, on_error="skip")
lists = micro_batches(source.labels * 0, 1)
list(feed.batches(lists))
half_way = feed.batches(lists)
next(half_way)
print("begun", flush=True)
"""


def test_a_process_that_closes_nothing_still_ends_at_once(tree):
    with subprocess.Popen(
        (sys.executable, "-c", LEFT, str(tree.parent)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        began = time.monotonic()
        lines.append(process.stdout.read())
        assert (lines, process.wait()) == (["begun\n", ""], 0)
    assert time.monotonic() - began < 15, "its workers sat out the grace of a SIGTERM"


def settle(root) -> None:
    """Make every folder look as if it had been written long ago."""
    for place in [root, *(p for p in root.rglob("*") if p.is_dir())]:
        os.utime(place, (1e9, 1e9))


@pytest.fixture
def tree(tmp_path):
    for name in ("b/2.png", "a/10.jpg", "a/9.JPEG", "a/deep/1.png", "b/.hidden.png", "a/notes.txt"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(name))
    settle(tmp_path / "train")
    return tmp_path / "train"


def test_the_index_is_scanned_once_and_kept_beside_the_data(tree):
    first, how = folder_index.load_or_scan(tree)
    assert "scanned" in how
    assert [first.names[i] for i in range(len(first.names))] == ["a/10.jpg", "a/9.JPEG", "a/deep/1.png", "b/2.png"]
    assert (first.classes, first.labels.tolist(), first.sizes.tolist()) == (("a", "b"), [0, 0, 0, 1], [8, 8, 12, 7])
    again, how = folder_index.load_or_scan(tree)
    left = "left out: 1 .txt, 1 hidden"
    assert how == f"4 images by {tree.with_name('train.index.npz')}; {left}"
    assert again.digest == first.digest


CHANGES = {
    "added": lambda tree: (tree / "a/11.png").write_bytes(b"new"),
    "removed": lambda tree: (tree / "a/deep/1.png").unlink(),
    "renamed": lambda tree: (tree / "b/2.png").rename(tree / "b/3.png"),
    "class added": lambda tree: [(tree / "c").mkdir(), (tree / "c/1.png").write_bytes(b"x")],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_scanned_again(tree, change):
    before, _ = folder_index.load_or_scan(tree)
    CHANGES[change](tree)
    after, how = folder_index.load_or_scan(tree)
    assert "scanned" in how
    assert after.digest != before.digest


def test_a_damaged_index_is_made_again(tree):
    before, _ = folder_index.load_or_scan(tree)
    tree.with_name("train.index.npz").write_bytes(b"damaged")
    after, how = folder_index.load_or_scan(tree)
    assert "scanned" in how
    assert after.digest == before.digest
    assert folder_index.load(tree.with_name("train.index.npz")) is not None


def test_a_folder_changed_just_now_is_not_trusted(tree):
    """A change within the clock's grain after the scan would not be seen."""
    os.utime(tree / "a")
    folder_index.load_or_scan(tree)
    assert "scanned" in folder_index.load_or_scan(tree)[1]


def test_an_altered_index_is_not_believed(tree):
    found, _ = folder_index.load_or_scan(tree)
    place = tree.with_name("train.index.npz")
    arrays = dict(np.load(place))
    arrays["labels"] = 1 - arrays["labels"]
    np.savez(place, **arrays)
    assert folder_index.load(place) is None
    assert folder_index.load_or_scan(tree)[0].labels.tolist() == found.labels.tolist()


def test_read_only_data_has_its_index_in_the_cache_folder(tree, tmp_path, monkeypatch):
    """As root a folder cannot be made read-only; a folder in the index's place has the same effect."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tree.with_name("train.index.npz").mkdir()
    _, how = folder_index.load_or_scan(tree)
    assert "index kept in " + str(tmp_path / "cache") in how
    assert str(tmp_path / "cache") in folder_index.load_or_scan(tree)[1]


def test_links_to_classes_and_images_are_followed_and_circles_are_not(tree, tmp_path):
    (tree / "z").symlink_to(tree / "b")
    (tree / "a/deep/up").symlink_to(tree / "a")
    (tree / "b/link.png").symlink_to(tree / "a/10.jpg")
    found = folder_index.scan(tree)
    names = [found.names[i] for i in range(len(found.names))]
    assert names == ["a/10.jpg", "a/9.JPEG", "a/deep/1.png", "b/2.png", "b/link.png", "z/2.png", "z/link.png"]


def test_a_missing_or_empty_class_folder(tree):
    (tree / "c").mkdir()
    (tree / "d").mkdir()
    with pytest.raises(PruneError, match=r"class folder .*c \(and 1 more\) holds no image"):
        folder_index.load_or_scan(tree)


def test_a_million_images_start_quickly(tmp_path):
    """ImageNet's size, simulated as an index: read and checked in seconds, and 80 bytes an image."""
    count, classes = 1_281_167, tuple(f"n{number:08}" for number in range(1000))
    root = tmp_path / "train"
    for name in classes:
        (root / name).mkdir(parents=True)
    settle(root)
    labels = np.sort(np.arange(count) % 1000)
    names = folder_index.Names.from_names(
        f"{classes[label]}/{classes[label]}_{number}.JPEG" for number, label in enumerate(labels)
    )
    folders = ("", *classes)
    changed = np.array([os.stat(root / folder).st_mtime_ns for folder in folders])
    made = folder_index.FolderIndex(names, labels, np.full(count, 110_000), classes, folders, changed, time.time_ns())
    folder_index.save(made, folder_index.index_locations(root)[0])
    began = time.perf_counter()
    source = open_source("imagefolder", str(tmp_path), "train", True)
    assert time.perf_counter() - began < 10
    assert len(source.labels) == count
    assert source.paths[count - 1] == root / f"n00000999/n00000999_{count - 1}.JPEG"  # type: ignore[union-attr]
    assert folder_index.index_locations(root)[0].stat().st_size < 80 * count

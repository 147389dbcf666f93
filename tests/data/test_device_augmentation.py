"""``data.augment_on: device``: the host form's pixels, by operations on whole batches, on any number of ranks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_prune.data import augment, sampling
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from tests.support.masks import write

CPU, COUNT = torch.device("cpu"), 23
KINDS = {
    "crop": {"augment": "crop"},
    "crop_flip": {"augment": "crop_flip", "padding": 5},
    "scheduled": {"augment": "crop_flip", "schedule": ((0, 16), (1, 24))},
    "window": {"augment": "resized_crop_flip"},
    "erased": {"augment": "crop_flip", "erasing": 0.7},
    "none": {"erasing": 0.7, "erasing_mode": "rand"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Photographs of several sizes in folders, and arrays of one size."""
    place, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(COUNT):
        folder = place / "train" / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (30 + number, 61 - number, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.jpg")
    arrays, labels = rng.integers(0, 256, (COUNT, 20, 20, 3), np.uint8), np.arange(COUNT) % 3
    np.savez(place / "arrays.npz", x_train=arrays, y_train=labels, x_test=arrays, y_test=labels)
    return place


def feed_of(form: str, root: Path, on: str, kind: str, workers: int = 0, device: torch.device = CPU) -> ImageLoader:
    source, place = ("imagefolder", root) if form == "files" else ("npz", root / "arrays.npz")
    look = TransformConfig(20, (0.0,) * 3, (1 / 255,) * 3, 0.875, augment_on=on, **KINDS[kind])
    backend = "memory" if form == "memory" else "torch"
    return ImageLoader(open_source(source, str(place), "train", True), look, device, workers, backend=backend)


def epochs(ranks: Communicator, form: str, root: Path, on: str, kind: str, workers: int = 0) -> dict[tuple, np.ndarray]:
    """(epoch, sample id) -> pixels that this rank saw in two epochs."""
    feed, out = feed_of(form, root, on, kind, workers), {}
    for epoch in range(2):
        lists = [ids for ids, _ in sampling.epoch_batches(COUNT, 6, 7, epoch, ranks.rank, ranks.world)]
        for batch in feed.batches(lists, (7, epoch)):
            for sample, pixels in zip(batch.ids.tolist(), batch.images.numpy(), strict=True):
                out[epoch, sample] = pixels
    feed.close()
    return out


FORMS = [
    (form, kind) for form in ("files", "arrays", "memory") for kind in KINDS if (form, kind) != ("files", "window")
]


@pytest.mark.parametrize(("form", "kind"), FORMS)
def test_the_pixels_of_the_host(form, kind, root):
    host, device = (epochs(Communicator(), form, root, on, kind) for on in ("host", "device"))
    assert host.keys() == device.keys()
    assert len(host) > COUNT
    for key, pixels in host.items():
        assert np.abs(pixels - device[key]).max() <= 1, "to one step of 255"
    assert any(
        not np.array_equal(host[0, sample], host[1, sample]) for epoch, sample in host if (1 - epoch, sample) in host
    )


@pytest.mark.parametrize("world", [1, 2, 3])
def test_on_any_number_of_ranks(world, root, pool):
    wanted = epochs(Communicator(), "files", root, "host", "erased")
    found = pool.run(world, epochs, "files", root, "device", "erased")
    together = {key: pixels for rank in found for key, pixels in rank.items()}
    assert together.keys() == wanted.keys()
    assert all(np.abs(together[key] - wanted[key]).max() <= 1 for key in wanted)


def test_workers_send_whole_images_and_the_loader_augments_them(root):
    """The host's share is decoding alone: what arrives from a worker is what evaluation sees."""
    feed = feed_of("files", root, "device", "crop_flip")
    ids, key = [np.arange(6)], (0, 1)
    _, sent = next(feed._image_backend.pixels(ids, feed.transform, key, 20))
    _, plain = next(feed._image_backend.pixels(ids, feed.transform, None, 20))
    assert sent.dtype == torch.uint8 and torch.equal(sent, plain)
    assert not torch.equal(next(feed.batches(ids, key)).images, next(feed.batches(ids)).images)
    with_workers = feed_of("files", root, "device", "crop_flip", workers=2)
    two = [np.arange(6), np.arange(6, 12)]
    for one, other in zip(feed.batches(two, key), with_workers.batches(two, key), strict=True):
        assert torch.equal(one.images, other.images)


def test_masks_move_with_their_images(tmp_path):
    root = write(tmp_path / "masks")
    source = open_source("maskfolder", str(root), "train", True)
    look = TransformConfig(16, (0.0,) * 3, (1.0,) * 3, augment="crop_flip")
    ids = [np.arange(len(source.labels))]
    host, device = (
        next(ImageLoader(source, replace(look, augment_on=on), CPU).batches(ids, (0, 1))) for on in ("host", "device")
    )
    assert torch.equal(host.labels, device.labels) and torch.equal(host.images, device.images)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rectangles_erased_at_once_are_those_erased_one_by_one(mode, memory_format, monkeypatch):
    look = TransformConfig(24, (0.0,), (1.0,), erasing=0.6, erasing_mode=mode)
    images = torch.rand(40, 3, 24, 18).contiguous(memory_format=memory_format)
    one_by_one = augment.erase(images.clone(), (3, 1), np.arange(40), look)
    monkeypatch.setattr(augment, "_erase_one_by_one", augment._erase_at_once)
    assert torch.equal(augment.erase(images.clone(), (3, 1), np.arange(40), look), one_by_one)
    assert not torch.equal(one_by_one, images)


def test_what_needs_each_image_by_itself_is_refused(root, ffcv):
    source = open_source("imagefolder", str(root), "train", True)
    look = TransformConfig(16, (0.5,) * 3, (0.5,) * 3, augment_on="device")
    with pytest.raises(PruneError, match="random resized crop of image files needs each file's own size"):
        ImageLoader(source, replace(look, augment="resized_crop_flip"), CPU)
    with pytest.raises(PruneError, match="timm's policies .* work image by image in Pillow"):
        ImageLoader(source, replace(look, auto_augment="rand-m9-inc1"), CPU)
    from dist_prune.cli.main import main
    from dist_prune.data.ffcv.backend import open_beton

    out = root / "other.beton"
    assert main(["make-ffcv", "--source", str(root), "--split", "train", "--write-mode", "raw", "--out", str(out)]) == 0
    with pytest.raises(PruneError, match="FFCV crops while it decodes"):
        ImageLoader(open_beton(out), look, CPU)

"""The contract of every backend: each id once on any number of ranks, the same label and evaluation pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from dist_prune.data import sampling
from dist_prune.data.datasets import ArraySource, open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.open_split import beton_path, open_split
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError

CPU, COUNT = torch.device("cpu"), 1001
PLAIN = TransformConfig(32, (0.0,) * 3, (1 / 255,) * 3)  # images come out as their pixels


@pytest.fixture(scope="module")
def trees(data, tmp_path_factory):
    """The first 1,001 CIFAR-10 training images as .npz and as PNG files, in the same order (by class)."""
    place = tmp_path_factory.mktemp("cifar")
    whole = open_source("npz", str(data / "cifar10.npz"), "", True)
    assert isinstance(whole, ArraySource)
    order = np.argsort(whole.labels[:COUNT], kind="stable")
    images, labels = whole.images[order], whole.labels[order]
    np.savez(place / "c.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = place / "train" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:04}.png")
    return place


# name -> (data.backend, data.source, below the folder of trees); a backend joins the contract by a line here
BACKENDS = {
    "memory": ("memory", "npz", "c.npz"),
    "torch on arrays": ("torch", "npz", "c.npz"),
    "torch on files": ("torch", "imagefolder", ""),
}


def feed_of(name: str, trees, look: TransformConfig = PLAIN, workers: int = 0) -> ImageLoader:
    backend, source, place = BACKENDS[name]
    opened = open_split(backend, source, str(trees / place), "train", True)
    return ImageLoader(opened.source, look, CPU, workers, torch.float64, backend=opened.backend)


def seen(ranks: Communicator, name: str, trees, look: TransformConfig, training: bool) -> list[tuple[int, int, int]]:
    """(id, label, pixel sum) of two epochs of this rank."""
    feed, out = feed_of(name, trees, look), []
    for epoch in range(2):
        if training:
            lists = [ids for ids, _ in sampling.epoch_batches(COUNT, 128, 7, epoch, ranks.rank, ranks.world)]
        else:
            lists = sampling.shard(sampling.micro_batches(np.arange(COUNT), 50), ranks.rank, ranks.world)
        for batch in feed.batches(lists, (7, epoch) if training else None):
            sums = batch.images.sum((1, 2, 3)).round().long()
            out += list(zip(batch.ids.tolist(), batch.labels.tolist(), sums.tolist(), strict=True))
    return out


@pytest.fixture(scope="module")
def truth(trees):
    source = open_source("npz", str(trees / "c.npz"), "", True)
    assert isinstance(source, ArraySource)
    return [(i, int(label), int(image.astype(int).sum())) for i, (label, image) in
            enumerate(zip(source.labels, source.images, strict=True))]  # fmt: skip


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_id_once_with_its_label_and_pixels(name, world, trees, truth, pool):
    found = [item for part in pool.run(world, seen, name, trees, PLAIN, False) for item in part]
    assert sorted(found) == sorted(truth * 2)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", BACKENDS)
def test_training_sees_every_id_once_and_the_same_pixels_on_every_world(name, world, trees, truth, pool):
    look = TransformConfig(32, (0.0,) * 3, (1 / 255,) * 3, augment="crop_flip")
    found = [item for part in pool.run(world, seen, name, trees, look, True) for item in part]
    assert sorted(item[:2] for item in found) == sorted(item[:2] for item in truth * 2)
    assert sorted(found) == sorted(seen(Communicator(), "memory", trees, look, True)), (
        "drawn from (seed, epoch, id) alone"
    )


@pytest.mark.parametrize("name", ["torch on arrays", "torch on files"])
def test_workers_change_nothing(name, trees):
    look = TransformConfig(
        32, (0.0,) * 3, (1 / 255,) * 3, augment="resized_crop_flip", auto_augment="rand-m9-mstd0.5", erasing=0.5
    )
    lists = sampling.micro_batches(np.arange(60), 16)
    one, two = (
        torch.cat([batch.images for batch in feed_of(name, trees, look, workers).batches(lists, (0, 1))])
        for workers in (0, 2)
    )
    assert torch.equal(one, two)


def test_an_epoch_goes_on_in_its_middle(trees):
    """What is left of an epoch is the lists that are left: nothing else has to be kept."""
    look = TransformConfig(32, (0.0,) * 3, (1 / 255,) * 3, augment="crop_flip")
    lists = [ids for ids, _ in sampling.epoch_batches(COUNT, 128, 7, 3, 0, 2)]
    whole = [batch.images for batch in feed_of("memory", trees, look).batches(lists, (7, 3))]
    rest = [batch.images for batch in feed_of("memory", trees, look).batches(lists[5:], (7, 3))]
    assert len(rest) == len(whole) - 5
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], rest, strict=True))


def test_who_serves_what(trees):
    arrays = open_split("auto", "npz", str(trees / "c.npz"), "", True)
    files = open_split("auto", "imagefolder", str(trees), "train", True)
    assert (arrays.backend, files.backend) == ("memory", "torch")
    assert "arrays" in arrays.why
    assert "train.beton" in files.why
    with pytest.raises(PruneError, match="'memory' is for arrays .* served by torch, or by ffcv"):
        open_split("memory", "imagefolder", str(trees), "train", True)
    assert beton_path("npz", "/x/c.npz", "", True) != beton_path("npz", "/x/c.npz", "", False)

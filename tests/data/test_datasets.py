"""Sources and feeds on real images; what is said when the data is not what the recipe says."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from dist_prune.data import digits
from dist_prune.data.datasets import ArraySource, check_labels, open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.split_checks import check_same_classes
from dist_prune.errors import PruneError

CPU = torch.device("cpu")


def test_digits_are_read_and_split_as_scikit_learn_does_it():
    dataset = load_digits()
    rows = train_test_split(np.arange(1797), test_size=450, random_state=0, stratify=dataset.target)
    for train, ids in zip((True, False), rows, strict=True):
        pixels, labels = digits.read_digits(train)
        assert np.array_equal(labels, dataset.target[np.sort(ids)]) and labels.dtype == np.int64
        assert np.array_equal(pixels[..., 0], (dataset.images[np.sort(ids)] * 255 / 16).round())
        assert pixels.dtype == np.uint8 and pixels.shape == (len(ids), 8, 8, 1)


def test_digits_without_scikit_learn_say_so(monkeypatch):
    monkeypatch.setattr(digits, "PLACE", "datasets/data/no_such.csv.gz")
    with pytest.raises(PruneError, match="digits is in scikit-learn"):
        open_source("digits", None, "", True)


def test_digits():
    train, test = (open_source("digits", None, "", flag) for flag in (True, False))
    assert (len(train.labels), len(test.labels)) == (1347, 450)
    assert isinstance(train, ArraySource)
    assert train.images.shape[1:] == (8, 8, 1)
    assert train.images.max() == 255


def test_cifar_and_mnist_are_the_real_ones(data):
    train = open_source("npz", str(data / "cifar10.npz"), "", True)
    assert (len(train.labels), train.in_chans, len(train.classes)) == (50_000, 3, 10)
    mnist = open_source("mnist", str(data), "", False)
    assert (len(mnist.labels), mnist.in_chans) == (10_000, 1)


def test_image_folder(data):
    source = open_source("imagefolder", str(data / "imagenet_1000"), "val", False)
    assert len(source.classes) == 1000
    feed = ImageLoader(source, TransformConfig(224, (0.5,) * 3, (0.5,) * 3, 0.875), CPU, workers=0)
    whole = torch.cat([batch.images for batch in feed.batches([np.array([3, 500]), np.array([999])])])
    assert whole.shape == (3, 3, 224, 224)
    with Image.open(source.paths[500]) as file:  # type: ignore[union-attr]
        side = min(file.size)
    assert side == 256
    other = torch.cat(
        [
            b.images
            for b in ImageLoader(source, feed.transform, CPU, workers=2).batches([np.array([3]), np.array([500, 999])])
        ]
    )
    assert torch.equal(whole, other)


@pytest.mark.parametrize("augment", ["crop_flip", "crop"])
def test_augmentation_follows_the_sample_not_the_batch(augment):
    source = open_source("digits", None, "", True)
    feed = ImageLoader(source, TransformConfig(8, (0.0,), (1.0,), augment=augment), CPU)
    ids = np.array([5, 9, 700, 2])
    together = next(feed.batches([ids], augment=(0, 3))).images
    alone = torch.cat([batch.images for batch in feed.batches([ids[i : i + 1] for i in range(4)], augment=(0, 3))])
    assert torch.equal(together, alone)
    assert not torch.equal(together, next(feed.batches([ids], augment=(0, 4))).images)
    plain = next(feed.batches([ids])).images
    assert torch.equal(plain, torch.from_numpy(source.images[ids]).permute(0, 3, 1, 2) / 255)  # type: ignore[union-attr]


def test_crops_are_windows_of_the_padded_image():
    """Each augmented image is one of the shifted (and, with crop_flip, mirrored) copies of the original."""
    source = open_source("digits", None, "", True)
    ids = np.arange(40)
    plain = next(ImageLoader(source, TransformConfig(8, (0.0,), (1.0,)), CPU).batches([ids])).images
    feed = ImageLoader(source, TransformConfig(8, (0.0,), (1.0,), augment="crop_flip"), CPU)
    flips = 0
    for image, original in zip(next(feed.batches([ids], augment=(0, 0))).images, plain, strict=True):
        padded = torch.nn.functional.pad(original, (1, 1, 1, 1))
        windows = [padded[:, r : r + 8, c : c + 8] for r in range(3) for c in range(3)]
        straight = any(torch.equal(image, window) for window in windows)
        mirrored = any(torch.equal(image, window.flip(2)) for window in windows)
        assert straight or mirrored
        flips += mirrored and not straight
    assert 8 < flips < 32


def test_missing_and_malformed_data(tmp_path):
    with pytest.raises(PruneError, match=r"there is no .*nowhere\. imagefolder: ROOT/train"):
        open_source("imagefolder", str(tmp_path / "nowhere"), "train", True)
    with pytest.raises(PruneError, match="data.root: 'npz' needs the place"):
        open_source("npz", None, "", True)
    with pytest.raises(PruneError, match="no cifar10 below"):
        open_source("cifar10", str(tmp_path), "", True)
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
    with pytest.raises(PruneError, match=r"class folder .*cat \(and 1 more\) holds no image"):
        open_source("imagefolder", str(tmp_path), "train", True)
    with pytest.raises(PruneError, match="there is no folder .*val"):
        open_source("imagefolder", str(tmp_path), "val", False)
    images = np.zeros((3, 4, 4))
    np.savez(tmp_path / "y.npz", x_train=images, x_test=images, y_train=np.zeros(3), y_test=np.zeros(3))
    with pytest.raises(PruneError, match=r"x_train of .* is float64"):
        open_source("npz", str(tmp_path / "y.npz"), "", True)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz_files_are_named(save, tmp_path):
    """Cut short anywhere (as a download that broke off), and with bytes in the middle that are others."""
    source, path = open_source("digits", None, "", True), tmp_path / "x.npz"
    save(path, x_train=source.images, y_train=source.labels, x_test=source.images, y_test=source.labels)
    whole = path.read_bytes()
    assert len(open_source("npz", str(path), "", True).labels) == len(source.labels)
    middle = len(whole) // 4
    for damaged in (
        whole[: len(whole) // 2], whole[:-10], whole[:100], b"", whole[:middle] + bytes(99) + whole[middle + 99 :],
        whole[:middle] + b"\xff" * 99 + whole[middle + 99 :],
    ):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(PruneError, match=r"data\.root: .*x\.npz cannot be read: .*x_train, y_train"):
            open_source("npz", str(path), "", True)


def test_splits_with_other_classes_are_refused(tmp_path):
    for split, names in (("train", "abc"), ("val", "ac")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "x.png")
    train, val = (open_source("imagefolder", str(tmp_path), split, True) for split in ("train", "val"))
    with pytest.raises(PruneError, match=r"evaluation images have 2 classes, the training images 3; .*\['b'\]"):
        check_same_classes(train, val)


def test_labels_outside_the_classes():
    with pytest.raises(PruneError, match="labels run from 0 to 7, but there are 3 classes"):
        check_labels(ArraySource(np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 7]), ("a", "b", "c")), "the images")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_named(tmp_path, workers):
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    (tmp_path / "train" / "dog").mkdir()
    for name in ("a", "b", "c", "../dog/d"):
        Image.new("RGB", (20, 20)).save(folder / f"{name}.png")
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[: len(whole) // 2])
    feed = ImageLoader(
        open_source("imagefolder", str(tmp_path), "train", True),
        TransformConfig(8, (0.5,) * 3, (0.5,) * 3),
        CPU,
        workers,
    )
    with pytest.raises(PruneError, match=r"sample 1: the image .*b\.png cannot be decoded"):
        list(feed.batches([np.array([0]), np.array([1, 2])]))

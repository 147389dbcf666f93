"""Arrays of an .npz file: axes in another order, unequal sides, labels that are none, which are blamed for it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_prune import methods
from dist_prune.cli.check import preview
from dist_prune.config import loading
from dist_prune.data import array_files
from dist_prune.data.datasets import ArraySource, open_source
from dist_prune.errors import PruneError

RNG = np.random.default_rng(0)
N = 12
LABELS = np.arange(N) % 4


def saved(folder: Path, images: np.ndarray | None = None, labels: Any = LABELS, **more: Any) -> str:
    images = RNG.integers(0, 256, (N, 8, 8, 3), np.uint8) if images is None else images
    parts = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels, **more}
    np.savez(folder / "a.npz", **parts)
    return str(folder / "a.npz")


def opened(path: str, layout: str | None = None, train: bool = True) -> ArraySource:
    found = open_source("npz", path, "", train, layout=layout)
    assert isinstance(found, ArraySource)
    return found


@pytest.mark.parametrize("shape", [(N, 3, 32, 32), (N, 1, 28, 28), (N, 13, 16, 16), (N, 3, 24, 32), (N, 4, 8, 8)])
def test_channels_first_is_recognised(tmp_path, shape):
    images = RNG.integers(0, 256, shape, np.uint8)
    path = saved(tmp_path, images)
    with pytest.raises(PruneError, match=r"looks like 12 images \(channels, height, width\).*data\.layout=nchw"):
        opened(path)
    found = opened(path, "nchw")
    assert np.array_equal(found.images, images.transpose(0, 2, 3, 1))
    assert found.in_chans == shape[1]
    last = saved(tmp_path, np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
    assert opened(last).identity == found.identity, "the same images are the same data set"


@pytest.mark.parametrize(
    "shape", [(N, 8, 8), (N, 8, 8, 1), (N, 32, 32, 3), (N, 3, 3, 3), (N, 4, 4, 16), (N, 24, 32, 4)]
)
def test_channels_last_is_taken_as_it_is(tmp_path, shape):
    images = RNG.integers(0, 256, shape, np.uint8)
    assert np.array_equal(opened(saved(tmp_path, images)).images, images.reshape(*shape[:3], -1))
    assert np.array_equal(opened(saved(tmp_path, images), "nhwc").images, images.reshape(*shape[:3], -1))


def test_a_layout_is_believed(tmp_path):
    images = RNG.integers(0, 256, (N, 3, 32, 32), np.uint8)
    assert opened(saved(tmp_path, images), "nhwc").in_chans == 32
    gray = RNG.integers(0, 256, (N, 8, 8), np.uint8)
    assert np.array_equal(opened(saved(tmp_path, gray), "nchw").images[..., 0], gray)


def recipe(path: str, *words: str):
    text = ["data.source=npz", f"data.root={path}", "backbone.name=resnet8p_cifar", "data.mean=", "data.std=", *words]
    return loading.load("quickstart", text, methods.options_of)


def checked(path: str, *words: str) -> dict[str, Any]:
    spec = recipe(path, *words)
    kind = methods.find(spec.method["name"])
    return preview(spec, kind(kind.Options()))


def test_unequal_sides_need_a_size(tmp_path):
    path = saved(tmp_path, RNG.integers(0, 256, (N, 8, 12, 3), np.uint8))
    with pytest.raises(PruneError, match=r"8 high and 12 wide.*data\.image_size=12 squeezes"):
        checked(path)
    assert checked(path, "data.image_size=12")["input"] == [3, 12, 12]
    other = saved(tmp_path, x_test=RNG.integers(0, 256, (N, 9, 9, 3), np.uint8))
    with pytest.raises(PruneError, match=r"training images are \(8, 8, 3\), test images \(9, 9, 3\)"):
        opened(other)


def test_check_says_what_a_run_says(tmp_path):
    path = saved(tmp_path, RNG.integers(0, 256, (N, 3, 8, 8), np.uint8))
    with pytest.raises(PruneError, match=r"data\.layout=nchw"):
        checked(path)
    assert checked(path, "data.layout=nchw")["input"] == [3, 8, 8]
    with pytest.raises(PruneError, match=r"data\.layout is for the arrays of an \.npz file; data\.source is digits"):
        loading.load("quickstart", ["data.layout=nchw"], methods.options_of)


def test_one_class_only(tmp_path):
    with pytest.raises(PruneError, match=r"all of them are of one class, '0': there is nothing to learn"):
        checked(saved(tmp_path, labels=0 * LABELS))
    some = loading.load("quickstart", ["data.classes=[3,5]"], methods.options_of)
    kind = methods.find(some.method["name"])
    assert preview(some, kind(kind.Options()))["classes"] == 2


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int64, np.uint64, np.float32, np.float64])
def test_whole_numbers_of_any_kind_are_labels(tmp_path, kind):
    for labels in (LABELS.astype(kind), LABELS.astype(kind)[:, None]):
        found = opened(saved(tmp_path, labels=labels))
        assert found.labels.dtype == np.int64
        assert found.labels.tolist() == LABELS.tolist()
        assert found.classes == ("0", "1", "2", "3")


WRAPPED = LABELS.astype(np.uint8) - np.uint8(1)
ODD = {
    "halves": (LABELS + 0.5, r"no whole numbers \(the first is 0\.5\)"),
    "not a number": (np.where(LABELS == 1, np.nan, 0.0), r"no whole numbers \(the first is nan\)"),
    "one-hot": (np.eye(4, dtype=np.uint8)[LABELS], r"\(12, 4\).*looks like one-hot labels: save y_train\.argmax\(1\)"),
    "text": (np.array(list("abcd"))[LABELS], r"are text or other objects \(<U1\).*np\.unique\(y_train"),
    "bytes": (np.array([b"cat", b"dog"])[LABELS % 2], r"are text or other objects \(\|S3\)"),
    "objects": (np.array(["cat", 1] * 6, dtype=object), r"labels y_train of .* are Python objects"),
    "wrapped": (WRAPPED, r"have the value 255, the largest of uint8: a -1 that wrapped around\?"),
    "wrapped, 64 bits": (WRAPPED.astype(np.int8).astype(np.uint64), r"the largest of uint64: a -1 that wrapped"),
    "negative": (LABELS - 1, r"go down to -1: classes are numbered from 0"),
    "too few": (LABELS[:-1], r"labels y_train of .* are \(11,\), and there are 12 images"),
    "absurd": (np.where(LABELS == 3, 2**40, LABELS), r"go up to 1,099,511,627,776, and only 4 numbers occur"),
    "absurd, unsigned": (np.where(LABELS == 3, 2**63, LABELS).astype(np.uint64), r"go up to 9223372036854775808: no"),
    "identities": (LABELS + 500_000, r"go up to 500,003, and only 4 numbers occur"),
}


@pytest.mark.parametrize("what", ODD)
def test_labels_are_blamed(tmp_path, what):
    labels, said = ODD[what]
    with pytest.raises(PruneError, match=said) as error:
        opened(saved(tmp_path, labels=labels))
    assert "the labels y_t" in str(error.value)


def test_many_classes_are_no_error(tmp_path):
    """All 256 of uint8, and a few images of ImageNet-21k."""
    images = np.zeros((256, 2, 2, 1), np.uint8)
    assert len(opened(saved(tmp_path, images, np.arange(256, dtype=np.uint8))).classes) == 256
    assert len(opened(saved(tmp_path, labels=np.where(LABELS == 3, 21_840, LABELS))).classes) == 21_841


def test_floats_from_zero_to_one_get_a_hint(tmp_path):
    with pytest.raises(PruneError, match=r"is float32 .*\(255 \* x\)\.round\(\)"):
        opened(saved(tmp_path, RNG.random((N, 8, 8, 3)).astype(np.float32)))


def test_what_looks_like_channels_first():
    assert array_files.channels_first((9, 3, 224, 224))
    assert not array_files.channels_first((9, 224, 224, 3))
    assert not array_files.channels_first((9, 32, 32, 64))

"""Tar shards: the same images, ids and pixels as the folder they were packed from; what is refused."""

import io
import json
import os
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dist_prune.data import tar_index
from dist_prune.data.class_order import renumber
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.data.shard_names import shard_paths
from dist_prune.errors import PruneError

CPU = torch.device("cpu")


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (24, 20 + number % 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def webdataset(folder: Path, split: str, shards: int = 2, each: int = 6, first: int = 0) -> Path:
    for shard in range(shards):
        members = {}
        for i in range(first + shard * each, first + (shard + 1) * each):
            members |= {f"{i:05}.jpg": jpeg(i), f"{i:05}.cls": str(i % 3).encode()}
        write_tar(folder / f"toy-{split}-{shard:04}.tar", members)
    return folder


def folders(root: Path, split: str, classes: int = 3, each: int = 4) -> dict[str, bytes]:
    members = {f"class {c}/{i}.jpg": jpeg(100 * c + i) for c in range(classes) for i in range(each)}
    for name, content in members.items():
        (root / split / name).parent.mkdir(parents=True, exist_ok=True)
        (root / split / name).write_bytes(content)
    return members


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_same_images_and_ids_as_the_folder(tmp_path):
    members = list(folders(tmp_path / "folder", "train").items())
    write_tar(tmp_path / "tar" / "train-0.tar", dict(members[:5]))
    write_tar(tmp_path / "tar" / "train-1.tar", dict(members[5:]))
    folder = open_source("imagefolder", str(tmp_path / "folder"), "train", True)
    tar = open_source("tar", str(tmp_path / "tar"), "train", True)
    assert tar.classes == folder.classes == ("class 0", "class 1", "class 2")
    assert np.array_equal(tar.labels, folder.labels)
    transform = TransformConfig(16, (0.5,) * 3, (0.5,) * 3, 0.875, augment="resized_crop_flip")
    ids = [np.array([7, 0, 11]), np.array([5, 4])]
    for augment in (None, (0, 3)):
        pixels = [
            torch.cat([b.images for b in ImageLoader(s, transform, CPU, workers=workers).batches(ids, augment=augment)])
            for s, workers in ((folder, 0), (tar, 0), (tar, 2))
        ]
        assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])


def test_webdataset_labels_masks_and_json(tmp_path):
    write_tar(
        tmp_path / "a-train-0.tar",
        {
            "x/0001.jpg": jpeg(1), "x/0001.cls": b"4\n", "x/0001.mask.png": jpeg(2), "x/0001.txt": b"a caption",
            "x/0002.json": json.dumps({"width": 3, "label": 2}).encode(), "x/0002.png": jpeg(3), "x/._0002.png": b"",
        },
    )  # fmt: skip
    source = open_source("tar", str(tmp_path), "train", True)
    assert source.labels.tolist() == [4, 2] and source.classes == ("0", "1", "2", "3", "4")
    assert source.location(1).endswith("a-train-0.tar:x/0002.png")
    assert "1 .mask.png" in source.note and "1 hidden" in source.note and "1 .txt" in source.note
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\ndog\nelk\nfox\n")
    assert renumber(source, None, str(names)).classes[4] == "elk"
    with pytest.raises(PruneError, match="have class numbers already"):
        renumber(source, "natural", None)
    names.write_text("ant\nbee\n")
    with pytest.raises(PruneError, match="lists 2 classes, and there are images of class number 4"):
        renumber(source, None, str(names))


def test_a_sample_has_one_image(tmp_path):
    """Two images of one sample were two samples, and an image with a second dot in its name was none."""
    write_tar(
        tmp_path / "train-0.tar",
        {
            "1.png": jpeg(10), "1.jpg": jpeg(1), "1.cls": b"0",
            "2.image.jpg": jpeg(2), "2.cls": b"1",
            "3.mask.png": jpeg(30), "3.jpeg": jpeg(3), "3.cls": b"0",
            "4.cls": b"1",
        },
    )  # fmt: skip
    source = open_source("tar", str(tmp_path), "train", True)
    assert source.labels.tolist() == [0, 1, 0]
    assert [source.fetch(i) for i in range(3)] == [jpeg(1), jpeg(2), jpeg(3)]
    for said in ("1 .png beside the sample's image", "1 .mask.png beside", "1 labels without an image"):
        assert said in source.note


def test_the_index_is_kept_and_read_again_and_made_anew_after_a_change(tmp_path):
    webdataset(tmp_path / "data", "train")
    first = open_source("tar", str(tmp_path / "data"), "train", True)
    again = open_source("tar", str(tmp_path / "data"), "train", True)
    assert "index kept in" in first.note and "by " in again.note and again.identity == first.identity
    moved = tmp_path / "elsewhere"
    (tmp_path / "data").rename(moved)
    assert open_source("tar", str(moved), "train", True).identity == first.identity
    assert open_source("tar", str(moved), "train", True).fetch(6) == jpeg(6)
    write_tar(moved / "toy-train-0001.tar", {"a.jpg": jpeg(77), "a.cls": b"1"})
    changed = open_source("tar", str(moved), "train", True)
    assert changed.fetch(6) == jpeg(77), "the file that was there before is not read on"
    assert len(changed.labels) == 7 and changed.identity != first.identity


def test_an_index_in_a_read_only_folder_goes_to_the_cache(tmp_path, monkeypatch):
    webdataset(tmp_path / "data", "train")
    shards = shard_paths(str(tmp_path / "data"), "train", True, ".tar")
    beside, cached = tar_index.index_locations(shards, "train")
    beside.mkdir()  # nothing can be written under that name
    source = open_source("tar", str(tmp_path / "data"), "train", True)
    assert cached.is_file() and str(cached) in source.note
    cached.write_bytes(cached.read_bytes()[:-100])
    assert len(open_source("tar", str(tmp_path / "data"), "train", True).labels) == 12, "a damaged index is made anew"


@pytest.mark.parametrize("pattern", ["toy-{train,val}-*.tar", "toy-{split}-{0000..0001}.tar", "toy-{split}-*.tar"])
def test_patterns_of_names(tmp_path, pattern):
    webdataset(tmp_path, "train")
    webdataset(tmp_path, "val", each=2)
    for split, train in (("train", True), ("val", False)):
        names = [path.name for path in shard_paths(f"{tmp_path}/{pattern}", split, train, ".tar")]
        assert names == [f"toy-{split}-0000.tar", f"toy-{split}-0001.tar"]


def refuse(pattern: str, root: object, split: str = "train") -> None:
    with pytest.raises(PruneError, match=pattern):
        open_source("tar", str(root), split, True)


def test_what_is_refused_about_names(tmp_path):
    webdataset(tmp_path, "train")
    refuse("has no \\*test\\*.tar and no test/\\*.tar. It holds toy-train-0000.tar", tmp_path, "test")
    refuse("one file for both splits", tmp_path / "toy-train-0000.tar")
    refuse("names the same files for training and evaluation", tmp_path / "toy-*.tar")
    refuse("toy-train-0002.tar is missing", tmp_path / "toy-{split}-{0000..0003}.tar")
    refuse("no file is called", tmp_path / "other-{split}-*.tar")
    refuse("no range of numbers of equal length", tmp_path / "toy-{split}-{7..0003}.tar")
    refuse("there is no", tmp_path / "missing")
    os.mkfifo(tmp_path / "fifo-train.tar")
    refuse("no regular file", tmp_path)


def test_what_is_refused_about_shards(tmp_path):
    whole = write_tar(tmp_path / "a" / "train.tar", {"1.jpg": jpeg(1), "1.cls": b"0", "2.jpg": jpeg(2), "2.cls": b"1"})
    content = whole.read_bytes()
    for name, damaged, message in (
        ("cut", content[:2000], "cut short"),
        ("mark", content.rstrip(b"\0") + bytes(512 - len(content.rstrip(b"\0")) % 512), "ends without the mark"),
        ("gz", b"\x1f\x8b" + content, "it is compressed"),
        ("text", b"hello" * 400, "cannot be read as an uncompressed tar"),
        ("empty", b"", "cannot be read as an uncompressed tar"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.tar").write_bytes(damaged)
        refuse(message, tmp_path / name)
    write_tar(tmp_path / "bare" / "train.tar", {"1.jpg": jpeg(1)})
    refuse("1.jpg in .* has no label", tmp_path / "bare")
    write_tar(tmp_path / "mixed" / "train.tar", {"1.jpg": jpeg(1), "1.cls": b"0", "2.jpg": jpeg(2), "2.cls": b"cat"})
    refuse("either all labels are class numbers or all are class names", tmp_path / "mixed")
    write_tar(tmp_path / "far" / "train.tar", {"1.jpg": jpeg(1), "1.cls": b"123456789"})
    refuse("no class number", tmp_path / "far")
    write_tar(tmp_path / "huge" / "train.tar", {"1.jpg": jpeg(1), "1.json": b'{"label": 1' + b"0" * 30 + b"}"})
    refuse("no class number", tmp_path / "huge")
    write_tar(
        tmp_path / "hidden" / "train.tar", {"1.jpg": jpeg(1), "1.cls": b"0", "2.jpg": jpeg(2), "2.cls": b"-1"}
    )  # fmt: skip
    refuse("2.jpg has the label -1; class numbers start at 0", tmp_path / "hidden")
    write_tar(tmp_path / "pair" / "train.tar", {"1.left.jpg": jpeg(1), "1.right.jpg": jpeg(2), "1.cls": b"0"})
    refuse("has 1.left.jpg and 1.right.jpg in one sample", tmp_path / "pair")
    webdataset(tmp_path / "twice", "train", shards=1)
    (tmp_path / "twice" / "toy-train-0009.tar").write_bytes((tmp_path / "twice" / "toy-train-0000.tar").read_bytes())
    refuse("is in .*0000.tar and in .*0009.tar", tmp_path / "twice")
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped" / "train-0.tar.gz").write_bytes(b"")
    refuse("is compressed", f"{tmp_path}/zipped/{{split}}-*.tar.gz")
    refuse("is compressed", tmp_path / "zipped")
    write_tar(tmp_path / "none" / "train.tar", {"readme.txt": b"x"})
    refuse("there is no image in .*; left out: 1 .txt", tmp_path / "none")


def test_a_shard_that_shrinks_later_is_one_unreadable_image_not_a_wrong_one(tmp_path):
    webdataset(tmp_path, "train", shards=1)
    source = open_source("tar", str(tmp_path), "train", True)
    path = tmp_path / "toy-train-0000.tar"
    os.truncate(path, int(source.index.offsets[-1]) + 10)  # type: ignore[attr-defined]
    assert len(source.fetch(0)) == source.index.sizes[0]  # type: ignore[attr-defined,arg-type]
    with pytest.raises(ValueError, match="shorter than when it was indexed"):
        source.fetch(5)
    refuse("cut short", tmp_path)  # the next command sees it before any work


def test_a_shard_that_was_replaced_by_a_longer_one_gives_no_image(tmp_path):
    webdataset(tmp_path, "train", shards=1)
    source = open_source("tar", str(tmp_path), "train", True)
    webdataset(tmp_path, "train", shards=1, each=60, first=90)
    with pytest.raises(ValueError, match=r"0000.tar has .* bytes and had .* when it was indexed: it was replaced"):
        source.fetch(0)


def test_many_shards_are_read_by_processes_and_give_the_same_index(tmp_path, monkeypatch):
    webdataset(tmp_path, "train", shards=4)
    shards = shard_paths(str(tmp_path), "train", True, ".tar")
    alone = tar_index.read(shards)
    monkeypatch.setattr(tar_index, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(tar_index, "cores", lambda: 2)
    together = tar_index.read(shards)
    assert together.digest == alone.digest and np.array_equal(together.offsets, alone.offsets)


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    from dist_prune.data import tar_shards

    monkeypatch.setattr(tar_shards, "OPEN_SHARDS", 2)
    monkeypatch.setattr(tar_shards, "_open", OrderedDict())
    webdataset(tmp_path, "train", shards=5, each=1)
    source = open_source("tar", str(tmp_path), "train", True)
    for sample in (0, 1, 2, 3, 4, 0, 3):
        assert source.fetch(sample) == jpeg(sample)
    assert len(tar_shards._open) <= 2

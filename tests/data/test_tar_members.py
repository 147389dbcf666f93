"""What tar files may hold: links, labels in several forms, names of all kinds; and shards that are not whole."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from dist_prune.data.datasets import open_source
from dist_prune.errors import PruneError
from tests.data.test_tar_shards import cache as cache  # an autouse fixture
from tests.data.test_tar_shards import jpeg, write_tar

FOUR = {f"{'ab'[i % 2]}/{i}.jpg": jpeg(i) for i in range(4)}


def opened(folder: Path):
    return open_source("tar", str(folder / "{split}.tar"), "train", True)


def labelled(folder: Path, *samples: dict[str, bytes | dict]):
    """Open a shard of samples: suffix -> bytes, or what is written as JSON."""
    members = {}
    for number, sample in enumerate(samples):
        for suffix, body in sample.items():
            members[f"{number}.{suffix}"] = body if isinstance(body, bytes) else json.dumps(body).encode()
        members[f"{number}.jpg"] = jpeg(number)
    write_tar(folder / "train.tar", members)
    return opened(folder)


def test_links_are_the_images_that_they_name(tmp_path):
    path = write_tar(tmp_path / "train.tar", FOUR)
    with tarfile.open(path, "a") as archive:
        for name, target, kind in (
            ("b/hard.jpg", "a/0.jpg", tarfile.LNKTYPE),
            ("b/soft.jpg", "../a/2.jpg", tarfile.SYMTYPE),
            ("b/gone.jpg", "/elsewhere/2.jpg", tarfile.SYMTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    source = opened(tmp_path)
    assert [source.location(i).split(":")[1] for i in (4, 5)] == ["b/hard.jpg", "b/soft.jpg"]
    assert source.labels.tolist() == [0, 1, 0, 1, 1, 1]
    assert source.fetch(4) == jpeg(0) and source.fetch(5) == jpeg(2)
    assert "1 links to files that are not in the shard" in source.note


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "train.tar", FOUR)
    with tarfile.open(path) as archive:
        place = archive.getmembers()[2].offset
    content = bytearray(path.read_bytes())
    content[place + 3] ^= 255
    path.write_bytes(content)
    with pytest.raises(PruneError, match=rf"train.tar is damaged at byte {place:,}, after b/1.jpg.* pack it again"):
        opened(tmp_path)


def test_joined_tar_files_are_not_read_in_part(tmp_path):
    first, second = write_tar(tmp_path / "1.tar", FOUR), write_tar(tmp_path / "2.tar", {"a/9.jpg": jpeg(9)})
    (tmp_path / "train.tar").write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(PruneError, match=r"goes on after the mark that ends a tar file \(after b/3.jpg\).*tar -A"):
        opened(tmp_path)


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar command here")
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_members_are_refused_by_name(form, tmp_path):
    for name in ("a/1.jpg", "b/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(jpeg(1))
        os.truncate(tmp_path / name, 1 << 20)
    command = ["tar", "--sparse", f"--format={form}", "-C", str(tmp_path), "-cf", str(tmp_path / "train.tar"), "a", "b"]
    subprocess.run(command, check=True)
    with pytest.raises(PruneError, match="a/1.jpg in .*train.tar is stored as a sparse file"):
        opened(tmp_path)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_odd_names(form, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w", format=form) as archive:
        for folder in ("kätze 1", "dog"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / f"{'ü b' * 40}.JPG").write_bytes(jpeg(len(folder)))
            archive.add(tmp_path / folder, f"./{folder}")
    source = opened(tmp_path)
    assert source.classes == ("dog", "kätze 1") and source.labels.tolist() == [1, 0]
    assert source.fetch(0) == jpeg(7) and source.location(0).endswith(f":kätze 1/{'ü b' * 40}.JPG")


def test_numbers_in_json_may_be_text_or_fractions(tmp_path):
    samples = (
        {"json": {"label": "0"}},
        {"json": {"label": 10.0}},
        {"cls": b"\xef\xbb\xbf2\r\n"},
        {"JSON": {"cls": "11"}},
    )
    source = labelled(tmp_path, *samples)
    assert source.labels.tolist() == [0, 10, 2, 11]
    assert source.numbered  # type: ignore[attr-defined]


def test_which_member_is_the_label(tmp_path):
    """``.cls`` before ``.json`` in either order, and neither a coarser label nor a key without a value."""
    source = labelled(
        tmp_path,
        {"cls": b"0", "json": {"label": 3}},
        {"json": {"label": "a dog", "cls": 4}, "cls": b"1"},
        {"cls": b"2", "coarse.cls": b"7"},
        {"json": {"label": None, "cls": 1}},
    )
    assert source.labels.tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ({"json": {"label": [1, 0]}}, r"1.json has label: \[1, 0\]"),
        ({"json": {"width": 3}}, "1.json has none of label, cls"),
        ({"json": b"{"}, "1.json is no JSON"),
        ({"cls": b" "}, "1.cls is empty"),
        ({}, "neither 1.cls nor .json lies beside it"),
    ],
)
def test_a_sample_without_a_label_says_what_is_there(sample, said, tmp_path):
    with pytest.raises(PruneError, match=rf"1.jpg in .*train.tar has no label: {said}.*Give each sample a .cls"):
        labelled(tmp_path, {"cls": b"0"}, sample)


def test_a_label_that_is_there_twice(tmp_path):
    path = write_tar(tmp_path / "train.tar", {"1.jpg": jpeg(1), "1.cls": b"0", "2.jpg": jpeg(2), "2.cls": b"1"})
    for value, said in ((b"0", ""), (b"1", "1.cls in .*train.tar: it is there twice, with 0 and 1: leave one out")):
        with tarfile.open(path, "a") as archive:
            info = tarfile.TarInfo("1.cls")
            info.size = 1
            archive.addfile(info, io.BytesIO(value))
        if said:
            with pytest.raises(PruneError, match=said):
                opened(tmp_path)
        else:
            assert opened(tmp_path).labels.tolist() == [0, 1]


def test_a_json_about_the_whole_shard_is_no_label(tmp_path):
    write_tar(tmp_path / "train.tar", {"info.json": b'{"label": "my set"}', **FOUR})
    source = opened(tmp_path)
    assert source.labels.tolist() == [0, 1, 0, 1] and "1 labels without an image" in source.note

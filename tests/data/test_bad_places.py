"""Images that cannot be read, indexes that cannot be kept, processes killed while they pack and index."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dist_prune.cli.main import main
from dist_prune.data import folder_index, tar_index
from dist_prune.data.datasets import open_source
from dist_prune.data.shard_names import shard_paths
from dist_prune.errors import PruneError
from tests.data.test_staging import small_disk
from tests.data.test_tar_shards import folders, jpeg, webdataset, write_tar

FORK = multiprocessing.get_context("fork")
NOBODY = 65534


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that other users reach."""
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


def _as_nobody(function: Callable[[], object], pipe) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    try:
        pipe.send(("fine", function()))
    except PruneError as error:
        pipe.send(("refused", str(error)))
    except BaseException as error:
        pipe.send(("broken", repr(error)))


def as_nobody(function: Callable[[], object]) -> tuple[str, object]:
    """What a process of a user without rights gets: fine, refused (with a sentence) or broken."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_as_nobody, args=(function, theirs))
    process.start()
    found = ours.recv()
    process.join()
    return found


def opened(source: str, root: Path) -> tuple[int, str]:
    found = open_source(source, str(root), "train", True)
    return len(found.labels), found.note


@pytest.mark.parametrize("what", ["shard", "folder of shards", "class folder", "folder of images", "parquet"])
def test_no_permission_is_a_sentence(what, public, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(public / "cache"))
    source, root = "tar", public / "data"
    if what == "parquet":
        pytest.importorskip("pyarrow")
        from tests.data.test_packing import write_parquet

        source, locked = "parquet", next(write_parquet(root, "train").glob("*.parquet"))
    elif what.endswith("shards") or what == "shard":
        webdataset(root, "train")
        locked = root / "toy-train-0001.tar" if what == "shard" else root
    else:
        folders(root, "train")
        source, locked = "imagefolder", root / "train" if what == "folder of images" else root / "train" / "class 1"
    locked.chmod(0)
    state, said = as_nobody(lambda: opened(source, root))
    locked.chmod(stat.S_IRWXU)
    assert state == "refused", said
    assert "Permission denied" in str(said) and str(locked) in str(said)


def test_places_that_are_read_only_for_the_user(public, monkeypatch):
    """The data's folder and the cache: the images are read, and it is said that the index could not be kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(public / "cache"))
    webdataset(public / "tar", "train")
    folders(public / "folder", "train")
    for source, root in (("tar", public / "tar"), ("imagefolder", public / "folder")):
        assert as_nobody(lambda source=source, root=root: opened(source, root)[0])[0] == "fine"
        state, (_, note) = as_nobody(lambda source=source, root=root: opened(source, root))  # type: ignore[misc]
        assert state == "fine" and "the index could not be saved" in note
    state, code = as_nobody(lambda: main(["pack", "--source", str(public / "folder"), "--out", str(public / "out")]))
    assert (state, code) == ("fine", 2)


def test_packing_where_nothing_may_be_written_is_a_sentence(public, capfd):
    folders(public / "folder", "train")
    as_nobody(lambda: main(["pack", "--source", str(public / "folder"), "--out", str(public / "out")]))
    said = capfd.readouterr().err
    assert "Traceback" not in said and str(public / "out") in said and "Permission denied" in said


def test_a_full_cache_folder_costs_the_index_and_nothing_else(tmp_path, monkeypatch):
    webdataset(tmp_path / "tar", "train")
    folders(tmp_path / "folder", "train")
    with small_disk(tmp_path / "disk", "64k") as disk:
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
        with contextlib.suppress(OSError):
            (disk / "filling").write_bytes(bytes(1 << 20))
        shards = shard_paths(str(tmp_path / "tar"), "train", True, ".tar")
        for beside in (
            tar_index.index_locations(shards, "train")[0],
            folder_index.index_locations(tmp_path / "folder" / "train")[0],
        ):
            beside.mkdir()  # nothing can be written under that name
        for source, count in (("tar", 12), ("imagefolder", 12)):
            root = tmp_path / ("tar" if source == "tar" else "folder")
            for _ in range(2):
                found = open_source(source, str(root), "train", True)
                assert len(found.labels) == count and "the index could not be saved" in found.note
        assert [path.name for path in disk.rglob("*") if path.is_file()] == ["filling"], "no halves are left behind"


def test_packing_on_a_full_disk_is_a_sentence_and_goes_on_elsewhere(tmp_path, capsys):
    folders(tmp_path / "folder", "train", each=900)
    with small_disk(tmp_path / "disk", "2m") as disk:
        words = ["pack", "--source", str(tmp_path / "folder"), "--out", str(disk), "--shard-mb", "1", "--name", "toy"]
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "No space left" in said and "The shards before it are complete" in said
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        assert main(words) == 0
        assert len(open_source("tar", str(disk), "train", True).labels) == 2700


def test_the_index_of_another_data_set_is_not_used(tmp_path):
    for name, first in (("one", 0), ("two", 30)):
        webdataset(tmp_path / name, "train", first=first)
        folders(tmp_path / f"{name}-folder", "train", classes=2 + (name == "two"))
    indexes = {}
    for name in ("one", "two"):
        for source, place in (("tar", tmp_path / name), ("imagefolder", tmp_path / f"{name}-folder")):
            indexes[name, source] = open_source(source, str(place), "train", True).identity
    tars = [next((tmp_path / name).glob("*.tar-index.npz")) for name in ("one", "two")]
    tars[1].write_bytes(tars[0].read_bytes())
    shutil.copy2(tmp_path / "one-folder" / "train.index.npz", tmp_path / "two-folder" / "train.index.npz")
    again = open_source("tar", str(tmp_path / "two"), "train", True)
    assert again.identity == indexes["two", "tar"] and again.fetch(0) == jpeg(30)
    again = open_source("imagefolder", str(tmp_path / "two-folder"), "train", True)
    assert again.identity == indexes["two", "imagefolder"] and len(again.classes) == 3


def test_labels_outside_the_class_list(tmp_path):
    pytest.importorskip("pyarrow")
    from tests.data.test_packing import write_parquet

    write_parquet(tmp_path, "train", label=[0, 1, 2, 3] + [0] * 6)
    with pytest.raises(PruneError, match=r"row 3 .* has the label 3, and the metadata name 3 classes"):
        open_source("parquet", str(tmp_path), "train", True)
    write_tar(tmp_path / "tar" / "train.tar", {"1.jpg": jpeg(1), "1.cls": b"-1", "2.jpg": jpeg(2), "2.cls": b"1"})
    with pytest.raises(PruneError, match="1.jpg has the label -1; class numbers start at 0"):
        open_source("tar", str(tmp_path / "tar"), "train", True)


def killed(work: Callable[[], object], after: float) -> bool:
    """Start work in a process of its own and kill it; whether it was still at it."""
    process = FORK.Process(target=work)
    process.start()
    process.join(after)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_packing_killed_at_random_moments_gives_the_same_bytes(tmp_path):
    folders(tmp_path / "folder", "train", each=900)

    def pack(out: Path) -> None:
        main(["pack", "--source", str(tmp_path / "folder"), "--out", str(out), "--shard-mb", "1", "--name", "toy"])

    open_source("imagefolder", str(tmp_path / "folder"), "train", True)
    start = time.perf_counter()
    pack(tmp_path / "whole")
    seconds, rng, times = time.perf_counter() - start, random.Random(0), 0
    for number in range(6):
        times += killed(lambda: pack(tmp_path / "broken"), rng.uniform(0.1, 0.6) * seconds)
        if number == 3:
            times += killed(lambda: pack(tmp_path / "broken"), 0.02)
    assert times >= 2
    pack(tmp_path / "broken")
    found, wanted = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*.tar")} for n in ("broken", "whole"))
    assert found == wanted and len(wanted) > 2
    manifests = [(tmp_path / name / "toy-train.json").read_bytes() for name in ("broken", "whole")]
    assert manifests[0] == manifests[1]
    assert not list((tmp_path / "broken").glob("*.part"))


def test_indexing_killed_at_random_moments_gives_the_same_index(tmp_path):
    webdataset(tmp_path / "tar", "train", shards=6, each=60)
    folders(tmp_path / "folder", "train", each=300)

    def index() -> None:
        for source in ("tar", "folder"):
            open_source("imagefolder" if source == "folder" else source, str(tmp_path / source), "train", True)

    kept = ("tar/*.npz", "*/train.index.npz")
    start = time.perf_counter()
    index()
    seconds, rng, times = time.perf_counter() - start, random.Random(0), 0
    wanted = [
        open_source(s, str(tmp_path / p), "train", True).identity
        for s, p in (("tar", "tar"), ("imagefolder", "folder"))
    ]
    for path in [path for pattern in kept for path in tmp_path.glob(pattern)]:
        path.unlink()
    for _ in range(12):
        times += killed(index, rng.uniform(0, 1) * seconds)
        for path in tmp_path.glob("tar/*.npz"):
            assert tar_index.load(path) is not None, "what has its name is whole"
    assert times >= 3
    index()
    found = [
        open_source(s, str(tmp_path / p), "train", True).identity
        for s, p in (("tar", "tar"), ("imagefolder", "folder"))
    ]
    assert found == wanted
    loaded = tar_index.load(next(tmp_path.glob("tar/*.npz")))
    assert loaded is not None and np.array_equal(
        loaded.offsets, tar_index.read(shard_paths(str(tmp_path / "tar"), "train", True, ".tar")).offsets
    )

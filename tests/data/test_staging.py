"""``data.stage_to``: files copied once per node, whole or not at all, by real processes on real file systems."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_prune.cli.main import main
from dist_prune.config.data import Data
from dist_prune.data import staging
from dist_prune.data.datasets import open_source
from dist_prune.data.loader import ImageLoader, TransformConfig
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from tests.data.test_tar_shards import folders, webdataset

CPU = torch.device("cpu")
LOOK = TransformConfig(16, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The same images as tar shards of both splits, as folders, and some as parquet files."""
    place = tmp_path_factory.mktemp("shared")
    for split in ("train", "val"):
        folders(place / "folder", split)
        webdataset(place / "tar", split)
    return place


def sources(kind: str, root: Path) -> dict[bool, Any]:
    place = str(root / ("folder" if kind == "imagefolder" else kind))
    return {train: open_source(kind, place, "train" if train else "val", train) for train in (True, False)}


def stage_here(kind: str, root: Path, to: Path) -> tuple[dict[bool, Any], list[str]]:
    said: list[str] = []
    return staging.stage(sources(kind, root), str(to), Communicator(), said.append), said


def copies(to: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(to)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(to.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def pixels(source) -> torch.Tensor:
    feed = ImageLoader(source, LOOK, CPU)
    return torch.cat([batch.images for batch in feed.batches([np.arange(len(source.labels))])])


@pytest.mark.parametrize("kind", ["tar", "imagefolder"])
def test_the_copies_are_read_and_nothing_else_changes(kind, root, tmp_path):
    before = sources(kind, root)
    after, said = stage_here(kind, root, tmp_path / "node")
    assert any("copying" in line for line in said) and "were copied now" in said[-1]
    for train, source in after.items():
        assert source.identity == before[train].identity
        assert source.location(3) == before[train].location(3), "messages name the user's own file"
        assert torch.equal(pixels(source), pixels(before[train]))
    for path in (tmp_path / "node").rglob("*.[jt]*[gr]"):
        path.write_bytes(b"")
    with pytest.raises(PruneError, match="shorter than when it was indexed|cannot be decoded"):
        pixels(after[True])


def test_both_splits_may_be_the_same_files(root, tmp_path):
    """data.train_split = data.eval_split, as for a first try: one copy of each file, by one thread."""
    both = {train: open_source("tar", str(root / "tar"), "val", train) for train in (True, False)}
    said: list[str] = []
    after = staging.stage(both, str(tmp_path / "node"), Communicator(), said.append)
    assert "2 files" in said[-1] and "2 of them were copied now" in said[-1]
    assert torch.equal(pixels(after[True]), pixels(both[False]))


def test_parquet_files_and_a_beton(root, tmp_path, ffcv):
    pytest.importorskip("pyarrow")
    from dist_prune.data.ffcv.backend import open_beton
    from tests.data.test_packing import write_parquet

    for split in ("train", "val"):
        write_parquet(tmp_path / "parquet", split)
    before = sources("parquet", tmp_path)
    after, _ = stage_here("parquet", tmp_path, tmp_path / "node")
    for path in (tmp_path / "parquet").iterdir():
        path.rename(path.with_suffix(".away"))
    assert pixels(after[True]).shape == (10, 3, 16, 16) and after[True].identity == before[True].identity
    out = tmp_path / "train.beton"
    command = ["make-ffcv", "--source", str(root / "folder"), "--split", "train", "--write-mode", "raw"]
    assert main([*command, "--out", str(out)]) == 0
    beton = open_beton(out)
    staged = staging.stage({True: beton}, str(tmp_path / "node"), Communicator())[True]
    wanted = pixels(beton)
    out.unlink()
    from dist_prune.data.ffcv import loader

    loader.shared_decoder.cache_clear() if hasattr(loader.shared_decoder, "cache_clear") else None
    assert torch.equal(pixels(staged), wanted)


def test_a_second_job_finds_them_and_copies_nothing(root, tmp_path):
    stage_here("tar", root, tmp_path)
    first = copies(tmp_path)
    after, said = stage_here("tar", root, tmp_path)
    assert copies(tmp_path) == first and "already" in said[-1] and len(said) == 1
    assert len(pixels(after[True])) == 12


@pytest.mark.parametrize("harm", ["cut", "altered", "gone"])
def test_a_copy_that_is_not_the_file_is_made_again(harm, root, tmp_path):
    stage_here("tar", root, tmp_path)
    first, shard = copies(tmp_path), next(tmp_path.rglob("toy-train-0001.tar"))
    if harm == "cut":
        os.truncate(shard, shard.stat().st_size - 7)
    elif harm == "altered":
        time.sleep(0.02)
        shard.write_bytes(bytes(shard.stat().st_size))
    else:
        shard.unlink()
    after, said = stage_here("tar", root, tmp_path)
    assert "1 of them were copied now" in said[-1]
    assert torch.equal(pixels(after[True]), pixels(sources("tar", root)[True]))
    same = [name for name, facts in copies(tmp_path).items() if first.get(name) == facts]
    assert len([name for name in same if name.endswith(".tar")]) == 3, "the others are left alone"


def test_changed_data_get_copies_of_their_own(tmp_path):
    webdataset(tmp_path / "tar", "train")
    webdataset(tmp_path / "tar", "val")
    stage_here("tar", tmp_path, tmp_path / "node")
    webdataset(tmp_path / "tar", "train", first=50)
    after, _ = stage_here("tar", tmp_path, tmp_path / "node")
    assert torch.equal(pixels(after[True]), pixels(sources("tar", tmp_path)[True]))


def staged_pixels(ranks: Communicator, root: Path, to: list[str], nodes: list[str]) -> tuple[torch.Tensor, int]:
    """What a rank reads from its node's copies, and how many files it copied itself."""
    copied, original = [0], staging.copy_file

    def counted(*arguments):
        copied[0] += 1
        original(*arguments)

    staging.copy_file = counted
    try:
        found = staging.stage(sources("tar", root), to[ranks.rank], ranks, node=nodes[ranks.rank])
    finally:
        staging.copy_file = original
    return pixels(found[True]), copied[0]


def test_two_ranks_of_a_node_copy_once(root, tmp_path, pool):
    found = pool.run(2, staged_pixels, root, [str(tmp_path)] * 2, ["a", "a"])
    assert [count for _, count in found] == [4, 0]
    assert all(torch.equal(seen, pixels(sources("tar", root)[True])) for seen, _ in found)


def test_each_node_has_its_own_copies(root, tmp_path, pool):
    """Three ranks: the first node has two of them, and its own folder."""
    to = [str(tmp_path / "first"), str(tmp_path / "ignored"), str(tmp_path / "second")]
    found = pool.run(3, staged_pixels, root, to, ["a", "a", "b"])
    assert [count for _, count in found] == [4, 0, 4]
    assert not (tmp_path / "ignored").exists(), "a node's folder is that of its first process"
    assert all(torch.equal(seen, pixels(sources("tar", root)[True])) for seen, _ in found)


def failing(ranks: Communicator, root: Path, to: list[str]) -> str:
    try:
        staging.stage(sources("tar", root), to[ranks.rank], ranks, node=str(ranks.rank))
    except PruneError as error:
        return str(error)
    return "no error"


def test_what_one_node_cannot_do_ends_all_of_them(root, tmp_path, pool):
    (tmp_path / "file").write_text("no folder")
    found = pool.run(2, failing, root, [str(tmp_path / "node"), str(tmp_path / "file")])
    assert found[0] == found[1]
    assert "cannot be made or written to" in found[0] and "node's own disk" in found[0]


def copy_in_a_job(root: Path, to: Path, ready, log: Path) -> None:
    opened = sources("tar", root)
    staging.BLOCK = 4096
    ready.set()
    with log.open("w") as file:
        staging.stage(opened, str(to), Communicator(), lambda text: print(text, file=file, flush=True))


def job(root: Path, to: Path, log: Path) -> Any:
    """A process of its own that stages; it has opened its sources."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=copy_in_a_job, args=(root, to, ready, log))
    process.start()
    assert ready.wait(30)
    return process


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Shards that take a while to copy block by block."""
    place = tmp_path_factory.mktemp("large")
    for split in ("train", "val"):
        webdataset(place / "tar", split, shards=6, each=3)
        for path in (place / "tar").glob(f"*{split}*.tar"):
            with path.open("ab") as file:
                file.write(bytes(6 << 20))
    sources("tar", place)  # their indexes are kept
    return place


def test_a_killed_copy_is_never_taken_for_a_whole_one(large, tmp_path):
    """SIGKILL at five random moments, one after another; the sixth process completes what they left."""
    rng, interrupted = random.Random(0), 0
    for _ in range(5):
        process = job(large, tmp_path / "node", tmp_path / "log")
        time.sleep(rng.uniform(0, 0.12))
        process.kill()
        process.join()
        interrupted += process.exitcode == -signal.SIGKILL
        for copy in tmp_path.rglob("*.tar"):
            if not copy.name.startswith("."):
                assert copy.read_bytes() == (large / "tar" / copy.name).read_bytes()
    assert interrupted >= 2
    last = job(large, tmp_path / "node", tmp_path / "log")
    last.join(60)
    assert last.exitcode == 0
    found = {path.name: path.read_bytes() for path in tmp_path.rglob("*.tar")}
    assert found == {path.name: path.read_bytes() for path in (large / "tar").glob("*.tar")}


def test_two_jobs_at_once_copy_once(large, tmp_path):
    logs = [tmp_path / "first", tmp_path / "second"]
    both = [job(large, tmp_path / "node", log) for log in logs]
    for process in both:
        process.join(60)
    said = [log.read_text() for log in logs]
    assert [process.exitcode for process in both] == [0, 0]
    assert sum("copying 12 files" in text for text in said) == 1
    assert sum("already" in text for text in said) == 1


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A file system of its own; skips where none may be mounted."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine may not mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_too_little_space_is_said_before_copying(large, tmp_path):
    with small_disk(tmp_path / "disk", "20m") as disk:
        with pytest.raises(PruneError, match=r"has 2\d\.\d MB free, the images .* need 75\.\d MB"):
            stage_here("tar", large, disk)
        assert not list(disk.rglob("*tar*"))


def test_a_source_that_shrank_is_no_copy(root, tmp_path):
    webdataset(tmp_path / "tar", "train")
    webdataset(tmp_path / "tar", "val")
    opened = sources("tar", tmp_path)
    os.truncate(tmp_path / "tar" / "toy-train-0001.tar", 3000)
    with pytest.raises(PruneError, match="has 3,000 bytes, and had .* when it was indexed"):
        staging.stage(opened, str(tmp_path / "node"), Communicator())
    # Several are copied at once: others may be whole by then.
    assert not list((tmp_path / "node").rglob("*toy-train-0001.tar*"))


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.stage_to is for image files .* whose images are read once"):
        Data(source="npz", root="x.npz", stage_to="/tmp")
    with pytest.raises(PruneError, match="data.stage_to copies image files, shards and .beton files"):
        staging.stage({True: open_source("digits", None, "", True)}, str(tmp_path), Communicator())
    (tmp_path / f"dist_prune-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(PruneError, match="belongs to another user"):
        staging.stage(
            {True: open_source("tar", str(webdataset(tmp_path / "t", "train")), "train", True)},
            str(tmp_path),
            Communicator(),
        )

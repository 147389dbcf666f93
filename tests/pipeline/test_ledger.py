"""The run directory: atomic writes, skipping, resuming, whose directory it is."""

import os
import subprocess
import sys

import pytest

from dist_prune.errors import PruneError
from dist_prune.fileio import file_digest, write_atomic
from dist_prune.pipeline.ledger import Ledger, bind_recipe, lock_run_directory

RECIPE = {
    "name": "a",
    "seed": 0,
    "backbone": {"name": "resnet18", "checkpoint": None},
    "data": {"source": "digits", "root": None},
    "train": {"epochs": 1},
    "score": {"images": 10, "save_every": 5},
    "method": {"name": "graph", "hash_size": 8, "combine": "leader"},
    "select": {"threshold": 0.7},
    "finetune": {"epochs": 3},
}


LINE = {"stage": "train", "fingerprint": "f", "outputs": {}}


def test_nothing_is_bound_before_a_stage_has_finished(tmp_path):
    """A typo in the first command does not take the directory."""
    bind_recipe(tmp_path, changed(backbone={"name": "resnet81"}))
    assert bind_recipe(tmp_path, RECIPE) == ""


def test_two_runs_in_one_directory(tmp_path):
    with (
        lock_run_directory(tmp_path),
        pytest.raises(PruneError, match="another process is running"),
        lock_run_directory(tmp_path),
    ):
        pass
    with lock_run_directory(tmp_path):
        pass


def changed(**sections) -> dict:
    return {
        key: {**value, **sections.get(key, {})} if isinstance(value, dict) else value for key, value in RECIPE.items()
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"backbone": {"name": "resnet50"}}, "backbone.name: 'resnet18' there, 'resnet50' here"),
        (
            {"backbone": {"name": "resnet18", "checkpoint_key": "ema"}},
            "backbone.checkpoint_key: None there, 'ema' here",
        ),
        ({"data": {"class_order": "natural"}}, "data.class_order: None there, 'natural' here"),
        ({"data": {"source": "npz"}}, "data.source: 'digits' there, 'npz' here"),
        ({"score": {"images": 20}}, "score.images: 10 there, 20 here"),
        ({"train": {"epochs": 2}}, "train.epochs: 1 there, 2 here"),
        ({"method": {"hash_size": 4}}, "method.hash_size: 8 there, 4 here"),
        ({"method": {"name": "l1"}}, "method.name: 'graph' there, 'l1' here"),
    ],
)
def test_a_directory_of_another_recipe_is_refused(tmp_path, change, said):
    bind_recipe(tmp_path, RECIPE, ("hash_size",))
    Ledger(tmp_path).append(LINE)
    with pytest.raises(PruneError, match="belongs to another recipe") as error:
        bind_recipe(tmp_path, changed(**change), ("hash_size",))
    assert said in str(error.value)
    assert "--run-dir" in str(error.value)
    assert bind_recipe(tmp_path, RECIPE, ("hash_size",)) == "", "the refusal left the directory as it was"


def test_later_fields_may_change_and_it_says_so(tmp_path):
    bind_recipe(tmp_path, RECIPE, ("hash_size",))
    Ledger(tmp_path).append(LINE)
    said = bind_recipe(tmp_path, changed(select={"threshold": 0.8}, finetune={"epochs": 9}), ("hash_size",))
    assert "select.threshold: 0.7 there, 0.8 here" in said
    assert "finetune.epochs: 3 there, 9 here" in said


def test_places_may_change_in_silence(tmp_path):
    bind_recipe(tmp_path, RECIPE)
    Ledger(tmp_path).append(LINE)
    other = changed(data={"root": "/elsewhere"}, backbone={"checkpoint": "/elsewhere"}, score={"save_every": 1})
    assert bind_recipe(tmp_path, other) == ""


def test_a_stage_is_done_while_its_outputs_are_unchanged(tmp_path):
    ledger = Ledger(tmp_path)
    write_atomic(tmp_path / "out", "result")
    line = {"stage": "score", "fingerprint": "f", "outputs": {"out": file_digest(tmp_path / "out")}}
    ledger.append(line)
    assert ledger.done("score", "f")
    assert not ledger.done("score", "g")
    assert not ledger.done("select", "f")
    (tmp_path / "out").write_text("altered")
    assert not ledger.done("score", "f")
    (tmp_path / "out").unlink()
    assert not ledger.done("score", "f")


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append({"stage": "score", "fingerprint": "f", "outputs": {}})
    with ledger.file.open("a") as file:
        file.write('5\n{}\n{"stage": "sele')
    assert [line["stage"] for line in ledger.lines()] == ["score"]
    assert ledger.done("score", "f")
    ledger.append({"stage": "select", "fingerprint": "g", "outputs": {}})
    assert [line["stage"] for line in ledger.lines()] == ["score", "select"], "the torn line swallows nothing"


FULL = """
import resource, signal, sys
from pathlib import Path
from dist_prune.fileio import write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_atomic(Path(sys.argv[1]), b"x" * 5000)
"""


def test_a_write_that_the_disk_refuses_leaves_the_old_file(tmp_path):
    """A real refusal of the kernel (a file-size limit), in a process of its own."""
    target = tmp_path / "artifact"
    write_atomic(target, "old")
    done = subprocess.run([sys.executable, "-c", FULL, str(target)], capture_output=True, text=True, check=False)
    assert "could not write" in done.stderr
    assert "the file from before is intact" in done.stderr
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target], "no temporary file is left behind"


def test_a_full_disk(tmp_path):
    """A real full file system (a tmpfs of 64 kB), where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs root and is not allowed here")
    try:
        write_atomic(disk / "artifact", "old")
        with pytest.raises(PruneError, match="No space left on device; the file from before is intact"):
            write_atomic(disk / "artifact", b"x" * 200_000)
        assert (disk / "artifact").read_text() == "old"
        write_atomic(disk / "artifact", "new")
        assert (disk / "artifact").read_text() == "new"
    finally:
        subprocess.run(["umount", str(disk)], check=True)

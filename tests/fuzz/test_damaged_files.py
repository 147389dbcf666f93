"""Damaged files that are read back, planted links, and what is no file among images."""

import os
import socket

import numpy as np
import pytest
from PIL import Image

from dist_prune.data import folder_index, folder_scan
from dist_prune.data.decoders import read_image
from dist_prune.errors import PruneError
from dist_prune.fileio import append_lines, write_atomic
from dist_prune.pipeline.ledger import Ledger, lock_run_directory
from dist_prune.training.tracking import Tracker
from tests.fuzz import readback


def test_two_hundred_damaged_files():
    wrong = []
    for label, act in readback.cases(0, 200):
        try:
            act()
        except Exception as error:
            wrong.append(f"{label}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_the_proof_of_the_newest_checkpoint_is_no_text(tmp_path):
    """Bytes that are no UTF-8: the one before, not a UnicodeDecodeError at every start."""
    readback.make_states(tmp_path)
    newest = max((tmp_path / "checkpoints").glob("*.sha256"))
    newest.write_bytes(b"\xff" + newest.read_bytes()[1:])
    assert (readback.states(tmp_path).newest() or "").startswith("step_000000005")


@pytest.mark.parametrize("name", [".lock", "ledger.jsonl", "metrics.jsonl", "recipe.yaml"])
def test_a_planted_link_is_not_followed(tmp_path, name, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.write_text("theirs")
    (run / name).symlink_to(other)
    if name == ".lock":
        with pytest.raises(PruneError, match="symbolic link"), lock_run_directory(run):
            pass
    elif name == "ledger.jsonl":
        with pytest.raises(PruneError, match="symbolic link"):
            Ledger(run).append({"stage": "train"})
    elif name == "metrics.jsonl":
        Tracker(True, (), run).log_jsonl({"loss": 1.0})
        assert "symbolic link" in capsys.readouterr().err
    else:
        write_atomic(run / name, "ours")
        assert not (run / name).is_symlink()
    assert other.read_text() == "theirs"


def test_a_planted_temporary_file_is_not_followed(tmp_path):
    other = tmp_path / "other"
    other.write_text("theirs")
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(other)
    write_atomic(tmp_path / "file", "ours")
    assert (tmp_path / "file").read_text() == "ours"
    assert other.read_text() == "theirs"


def test_nothing_is_appended_to_a_fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(PruneError, match="no regular file|No such device"):
        append_lines(tmp_path / "fifo", ["a"])


def test_what_is_no_file_among_images_is_skipped_and_counted(tmp_path, monkeypatch):
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "cat.png")
    os.mkfifo(folder / "fifo.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "train" / "circle").symlink_to("circle")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(folder)  # a socket's name has to be short
        server.bind("socket.png")
        found = folder_index.scan(tmp_path / "train")
    assert [found.names[n] for n in range(len(found.names))] == ["cat/cat.png"]
    assert found.left_out[folder_scan.NOT_REGULAR] == 4
    for name in ("fifo.png", "device.jpg"):
        with pytest.raises(ValueError, match="it is not a regular file"):
            read_image(folder / name)

"""``dist-prune ps``: who runs in a run directory, by its lock and the note in it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_prune.cli.main import main
from dist_prune.cli.ps import live, of_this_machine
from dist_prune.errors import PruneError
from dist_prune.fileio import read_json
from dist_prune.pipeline.ledger import lock_run_directory, name_holder
from tests.cli.test_status import run_folder

HOLD = """
import sys
from pathlib import Path
from dist_prune.pipeline.ledger import lock_run_directory, name_holder
with lock_run_directory(Path(sys.argv[1])):
    name_holder(Path(sys.argv[1]), 4)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_what_another_process_runs_is_listed(tmp_path, monkeypatch, capsys):
    """Found by its open lock wherever it is, with its process, and gone with it."""
    busy = run_folder(tmp_path / "far/away/and/deep/busy", ["train"], "score")
    run_folder(tmp_path / "idle", ["train"], "score")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(busy)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert of_this_machine()[busy] == holder.pid
    assert main(["ps", "--json"]) == 0
    rows = {Path(row["run"]): row for row in json.loads(capsys.readouterr().out)}
    row = rows[busy]
    assert (row["host"], row["pid"], row["ranks"], row["stage"]) == (socket.gethostname(), holder.pid, 4, "score")
    assert time.time() - row["began"] < 60 and row["locked"]
    assert main(["ps", str(tmp_path / "idle")]) == 0
    assert "nothing runs below" in capsys.readouterr().out
    assert main(["ps", str(busy)]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "host", "process", "ranks"]
    assert line.split()[:4] == [str(busy), socket.gethostname(), str(holder.pid), "4"]
    with pytest.raises(PruneError, match=f"process {holder.pid} on {socket.gethostname()}"), lock_run_directory(busy):
        pass
    holder.communicate()
    assert live(busy) is None
    assert main(["ps", "missing"]) == 2
    assert "there is no folder missing" in capsys.readouterr().err


def test_a_run_of_another_host_is_listed_while_its_files_are_new(tmp_path, capsys):
    """A lock of another host may not be visible; one that left an error or a report does not run."""
    note = json.dumps({"host": "elsewhere", "pid": 7, "ranks": 2, "began": time.time() - 100})
    folders = [
        run_folder(tmp_path / "new", ["train"], "score"),
        run_folder(tmp_path / "old", ["train"], "score"),
        run_folder(tmp_path / "failed", ["train"], "score", "error"),
        run_folder(tmp_path / "done", ["train", "report"]),
    ]
    for folder in folders:
        (folder / ".lock").write_text(note)
    for file in folders[1].iterdir():
        os.utime(file, (time.time() - 1000, time.time() - 1000))
    assert [live(folder) is not None for folder in folders] == [True, False, False, False]
    assert main(["ps", str(tmp_path)]) == 0
    assert "elsewhere ?  7        2      1 min" in capsys.readouterr().out


def test_notes_of_earlier_versions_and_damaged_ones(tmp_path):
    """An empty lock file names nobody; wrong values are left out."""
    folder = run_folder(tmp_path / "run", [], "train")
    with lock_run_directory(folder):
        name_holder(folder, 2)
        assert read_json(folder / ".lock")["ranks"] == 2
        for text in ("", "[]", "{", '{"host": 3, "pid": "x"}'):
            (folder / ".lock").write_text(text)
            row = live(folder)
            assert row is not None and [row[key] for key in ("host", "pid", "ranks", "began")] == [None] * 4

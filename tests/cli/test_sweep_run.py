"""A sweep on this machine: its board, and its end by a signal."""

import fcntl
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dist_prune.cli import sweep_board
from dist_prune.cli.sweep_board import Board, Row, figure_of, last_error
from tests.cli.test_status import run_folder
from tests.support.launch import ROOT, SMALL, environment


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(folder: Path, **body: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(body))
    return folder


def test_the_figure_of_a_finished_run(tmp_path):
    figures = {"dense": {"top1": 91.5}, "finetuned": {"top1": 90.25}}
    shares = {"achieved": {"channels": 0.7, "macs": 0.5}, "target": {"macs": 0.5}}
    assert figure_of(report(tmp_path / "a", **figures, **shares)) == "top-1 % 91.50 -> 90.25, 50.0 % macs"
    task = {"primary": "error", "titles": {"error": "mean error"}}
    other = {"dense": {"error": 0.123456}, "finetuned": {"error": 1.5}}
    assert figure_of(report(tmp_path / "b", task=task, **other, **shares)) == "mean error 0.1235 -> 1.5, 50.0 % macs"
    for body in ({}, figures, {**figures, **shares, "dense": {"top1": "x"}}, {**figures, **shares, "task": 3}):
        assert figure_of(report(tmp_path / "c", **body)) == ""
    assert figure_of(tmp_path / "none") == ""


def test_the_board_where_there_is_no_terminal(tmp_path, monkeypatch):
    rows = [Row(f"task-{n}", tmp_path / f"{n}") for n in range(3)]
    out = io.StringIO()
    board = Board(rows, 2, out)
    busy = run_folder(rows[1].folder, ["train"], "score")
    report(rows[0].folder, dense={"top1": 50}, finetuned={"top1": 40}, achieved={"macs": 0.5}, target={})
    rows[0].start(), rows[1].start()
    board.show()
    assert out.getvalue() == "", "a line a minute"
    rows[0].began -= 100
    rows[0].end(3)
    board.show()
    line = out.getvalue()
    assert line.startswith(
        "1/3  task-0: finished, target missed, 1 min 40 s: top-1 % 50.00 -> 40.00, 50.0 % macs, about"
    )
    assert 95 <= _seconds(line.rpartition("about ")[2]) <= 100, "two of 100 s at a time: one runs, one waits"
    with (busy / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        note = {"what": "score l1", "done": 3, "total": 40, "seconds_left": 200.0, "at": time.time() + 5}
        (busy / "progress.json").write_text(json.dumps(note))
        monkeypatch.setattr(sweep_board, "PLAIN_EVERY_S", 0.0)
        board.show()
    last = out.getvalue().splitlines()[-1]
    assert last.startswith("1/3 finished, 1 run, 1 wait, about")
    assert re.search(r"  task-1 score score l1 3/40 3 min 2\d s left$", last), last
    (rows[2].folder).mkdir()
    (rows[2].folder / "sweep.log").write_text("one\nValueError: two\n")
    rows[1].end(75), rows[2].start(), rows[2].end(-9)
    board.show()
    assert "2/3  task-1: stopped" in out.getvalue() and "3/3  task-2: failed, 0 s: ValueError: two" in out.getvalue()


def _seconds(text: str) -> int:
    found = re.match(r"(?:(\d+) min )?(\d+) s", text)
    assert found is not None, text
    return 60 * int(found[1] or 0) + int(found[2])


def test_the_board_on_a_terminal(tmp_path):
    """Rows that run or failed stay where not all fit; lines are as wide as the terminal at most."""
    rows = [Row(f"a_long_common_beginning_of_names-{n}", tmp_path / f"{n}") for n in range(40)]
    for row in rows:
        row.folder.mkdir()
    rows[30].start()
    (rows[35].folder / "errors").mkdir()
    (rows[35].folder / "errors/rank_0.json").write_text(json.dumps({"error": "first\ndata.root: there is none"}))
    rows[35].start(), rows[35].end(2)
    out = Terminal()
    board = Board(rows, 1, out)
    board.show()
    board.show()
    assert out.getvalue().count("\x1b[J") == 1, "not yet a second later"
    board.show(final=True)
    assert out.getvalue().count("\x1b[J") == 2
    lines = board.table(72, 12).splitlines()
    assert len(lines) == 11 and max(map(len, lines)) == 71
    assert any(re.fullmatch(r" 30 \.{3}\S+names-30  starts +0 s", line) for line in lines), lines
    assert any(re.match(r" 35 \.{3}\S+names-35  refused +0 s +data.root: ", line) for line in lines), lines
    assert lines[-2] == "... 32 more tasks"
    assert lines[-1] == "0/40 finished, 1 run, 38 wait, 1 did not finish, about 0 s left"
    assert last_error(rows[35].folder) == "data.root: there is none"


@pytest.mark.slow
def test_a_stopped_sweep_stops_its_runs_which_save(tmp_path):
    """SIGTERM: the running task saves, the other does not start. SIGKILL: the task ends with the sweep."""
    keys = dict(word.split("=") for word in SMALL) | {"train.epochs": "400", "train.save_every_steps": "3"}
    values = {key: json.loads(value) if value[0] in "[0123456789" else value for key, value in keys.items()}
    tasks = [{**values, "seed": seed} for seed in (0, 1)]
    (tmp_path / "two.yaml").write_text(json.dumps({"tasks": [{"base": "quickstart", "list": tasks}]}))
    screen, terminal = pty.openpty()

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dist_prune", "sweep", "two.yaml", "--run", "--json"]
        more = environment(PYTHONPATH=str(ROOT))
        return subprocess.Popen(command, cwd=tmp_path, env=more, stdout=subprocess.PIPE, stderr=terminal, text=True)

    def until(fits) -> None:
        deadline = time.monotonic() + 120
        while not fits():
            assert time.monotonic() < deadline
            time.sleep(0.2)

    sweep = start()
    until(lambda: any(tmp_path.glob("runs/two/*/train_checkpoints/*.sha256")))
    sweep.send_signal(signal.SIGTERM)
    body = json.loads(sweep.communicate(timeout=60)[0])
    assert sweep.returncode == 75
    assert [(entry["state"], entry["code"]) for entry in body] == [("stopped", 75), ("not started", None)]
    shown = os.read(screen, 1_000_000).decode()
    assert "0/2 finished" in shown and "stopped by SIGTERM" in shown

    sweep, log = start(), Path(tmp_path / body[0]["run"] / "sweep.log")
    until(lambda: "resumes after epoch" in log.read_text())
    children = psutil.Process(sweep.pid).children()
    assert len(children) == 1
    sweep.kill()
    assert not psutil.wait_procs(children, timeout=30)[1], "it ends with the sweep"

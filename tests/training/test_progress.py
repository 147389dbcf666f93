"""Progress: a line a minute without a terminal, a bar on one, the time left, quiet runs, every long stage of a run."""

import io
import json
import re
import sys
import time

import pytest

from dist_prune import run
from dist_prune.training import progress, tracking
from dist_prune.training.progress import duration
from dist_prune.training.tracking import Tracker
from tests.support.launch import SMALL


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still between two calls of ``pass_``."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def pass_(seconds: float) -> None:
        now[0] += seconds

    return pass_


def test_a_line_a_minute_with_the_time_left(clock, capsys):
    tracker = Tracker(True)
    for item in tracker.bar(range(1, 31), 30, "score"):
        clock(10)
        assert item
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"  score: {done}/30, {duration(10 * (30 - done))} left" for done in (6, 12, 18, 24)]


def test_progress_is_kept_for_other_programs(clock, tmp_path, monkeypatch):
    """Every ten seconds, in quiet runs too, with the items of later epochs in the time that is left."""
    monkeypatch.setenv("DIST_PRUNE_QUIET", "1")
    notes = []
    for item in Tracker(True, (), tmp_path).bar(range(8), 8, "train", later=8):
        clock(4)
        file = tmp_path / "progress.json"
        notes.append(json.loads(file.read_text()) if file.exists() else None)
        assert item in range(8)
    assert notes[:3] == [None] * 3, "known after the third item is done"
    assert {key: notes[3][key] for key in ("what", "done", "total", "seconds_left")} == {
        "what": "train", "done": 3, "total": 8, "seconds_left": 4 * 13,
    }  # fmt: skip
    assert [note["done"] for note in notes[3:]] == [3, 3, 3, 6, 6]
    for _ in Tracker(False, (), tmp_path / "other_rank").bar(range(4), 4, "train"):
        clock(20)
    assert not (tmp_path / "other_rank").exists()


def test_short_pieces_of_work_share_the_minute(clock, capsys):
    """Ten passes of half a minute are five lines, not none and not a line for each item."""
    tracker = Tracker(True)
    for number in range(10):
        for _ in tracker.bar(range(10), 10, f"pass {number}"):
            clock(3)
    lines = capsys.readouterr().out.splitlines()
    assert 4 <= len(lines) <= 5 and len({line.split(":")[0] for line in lines}) == len(lines)


def test_the_epochs_that_follow_count(clock, capsys):
    for _ in Tracker(True).bar(range(10), 10, "train, epoch 1 of 3", later=20):
        clock(30)
    assert capsys.readouterr().out.splitlines()[0] == ("  train, epoch 1 of 3: 2/10, 4 min 0 s left, 14 min 0 s in all")


def test_what_was_found_done_took_no_time(clock, capsys):
    """Of 100 jobs 90 were in the cache: two took 60 s, and the other eight take four minutes."""
    meter = Tracker(True).meter(100, "jobs")
    clock(60)
    meter.update(92, ran=2)
    meter.close()
    assert capsys.readouterr().out == "  jobs: 92/100, 4 min 0 s left\n"


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "SETTLED_S", 0.0)
    for _ in Tracker(True).bar(range(4), 4, "evaluate dense", later=8):
        time.sleep(0.12)
    said = terminal.getvalue()
    assert "evaluate dense:  25%" in said and re.search(r"\d s in all", said)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("talks", [True, False])
def test_quiet_and_other_ranks_print_nothing(talks, clock, monkeypatch, capsys):
    if talks:
        monkeypatch.setenv(tracking.QUIET, "1")
    tracker = Tracker(talks)
    tracker.info("a line")
    for _ in tracker.bar(range(10), 10, "score"):
        clock(100)
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_every_long_stage_of_a_run_says_how_long_it_takes(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    monkeypatch.setenv(tracking.QUIET, "")  # --quiet sets it in this process
    words = [
        "--recipe",
        "quickstart",
        "--run-dir",
        str(tmp_path / "run"),
        *SMALL,
        "repair.method=least_squares",
        "repair.images=64",
        "train.epochs=1",
    ]
    assert run.main([*words, "finetune.epochs=1"]) == 0
    said = capsys.readouterr().out
    for work in (
        "train, epoch 1 of 1", "score", "repair", "finetune, epoch 1 of 1", "evaluate dense", "evaluate finetuned",
        "measure times",
    ):  # fmt: skip
        assert re.search(rf"^  {work}: \d+/\d+, \d+ s left", said, re.M), work
    last = said.splitlines()[-1]
    assert re.fullmatch(
        r"quickstart: finished in \d+ s \((\w+ \d+ s, ){2}\w+ \d+ s\); the command took (\d+ \w+ )?\d+ \w+", last
    ), last
    assert run.main([*words, "finetune.epochs=2", "--quiet"]) == 0
    assert capsys.readouterr().out == ""

"""The progress of a sweep's tasks: a table refreshed in place on a terminal, lines elsewhere."""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dist_prune.cli.status import NOT_BEGUN, aligned, describe, last_line
from dist_prune.errors import MISSED
from dist_prune.fileio import read_json
from dist_prune.training.progress import PLAIN_EVERY_S, duration

LOG = "sweep.log"  # in each task's run directory: what the run printed
CODES = {0: "finished", MISSED: "finished, target missed", 75: "stopped", 2: "refused"}
REFRESH_S = 1.0  # seconds between two looks at the run directories on a terminal
WAITS = "waits"


@dataclass
class Row:
    """A task of the sweep.

    Attributes:
        name: the task's.
        folder: its run directory.
        state: ``waits``, ``runs``, or how it ended.
        began: time of ``time.monotonic()`` at which its process started.
        seconds: how long the process took; None before its end.
        note: the figure at the end, or the last error.
    """

    name: str
    folder: Path
    state: str = WAITS
    began: float = 0.0
    seconds: float | None = None
    note: str = ""

    def start(self) -> None:
        """Its process has started."""
        self.state, self.began = "runs", time.monotonic()

    def end(self, code: int) -> None:
        """Its process has ended with an exit code."""
        self.seconds, self.state = time.monotonic() - self.began, CODES.get(code, "failed")
        self.note = figure_of(self.folder) if code in (0, MISSED) else last_error(self.folder)

    def cells(self) -> list[str]:
        """Name, state or stage, progress, time, note."""
        if self.state != "runs":
            return [self.name, self.state, "", "" if self.seconds is None else duration(self.seconds), self.note]
        found, since = describe(self.folder), time.monotonic() - self.began
        if found["state"] != "running":  # it imports, or has not yet locked its run directory
            return [self.name, "starts", "", duration(since), ""]
        left, stage = found["seconds_left"], found["stage"]
        return [
            self.name, "checks" if stage == NOT_BEGUN else stage, found["work"], duration(since),
            "" if left is None else f"{duration(left)} left",
        ]  # fmt: skip


class Board:
    """Shows the rows again and again while their processes run.

    Args:
        rows: a task each.
        jobs: tasks at a time.
        out: where to.
    """

    def __init__(self, rows: Sequence[Row], jobs: int, out: TextIO):
        self._rows, self._jobs, self._out = rows, jobs, out
        self._start = self._shown_at = time.monotonic()
        self._terminal = out.isatty()
        self._drawn = 0
        self._ended: set[str] = set()

    def show(self, final: bool = False) -> None:
        """Show what has changed: on a terminal the whole table, elsewhere who has ended, and a line a minute.

        Args:
            final: the last time; it is shown whenever the time before was.
        """
        now = time.monotonic()
        if self._terminal:
            if final or not self._drawn or now - self._shown_at >= REFRESH_S:
                self._shown_at = now
                self._draw(self.table(*self._size()))
            return
        for row in self._rows:
            if row.seconds is not None and row.name not in self._ended:
                self._ended.add(row.name)
                note = f": {row.note}" if row.note else ""
                count = f"{len(self._ended)}/{len(self._rows)}"
                self._print(f"{count}  {row.name}: {row.state}, {duration(row.seconds)}{note}{self._rest()}")
                self._shown_at = now
        if now - self._shown_at >= PLAIN_EVERY_S and not final:
            self._shown_at = now
            self._print(self.line())

    def line(self) -> str:
        """Everything in one line."""
        running = [row.cells() for row in self._rows if row.state == "runs"]
        each = "; ".join(" ".join(filter(None, [name, stage, work, note])) for name, stage, work, _, note in running)
        return f"{self._counts()}{self._rest()}  {each}".rstrip()

    def table(self, columns: int = 120, lines: int = 10_000) -> str:
        """The table, cut to the size of a terminal: what runs and what failed stays before what waits or is done."""
        head = ["task", "stage", "work", "time", "figure, error or time left"]
        order = sorted(range(len(self._rows)), key=lambda n: (_rank(self._rows[n]), n))
        kept = sorted(order[: max(1, lines - 4)])
        cells = [head]
        for n in kept:
            name, *others = self._rows[n].cells()
            cells.append([f"{n:3} {_end(name, max(24, columns // 3))}", *others])
        texts = aligned(cells).split("\n")
        if len(kept) < len(self._rows):
            texts.append(f"... {len(self._rows) - len(kept)} more tasks")
        texts.append(f"{self._counts()}{self._rest()}")
        return "\n".join(text.rstrip()[: columns - 1] for text in texts)

    def _size(self) -> tuple[int, int]:
        """(columns, lines) of the terminal."""
        try:
            size = os.get_terminal_size(self._out.fileno())
        except OSError:
            return 80, 24
        return size.columns or 80, size.lines or 24

    def _draw(self, text: str) -> None:
        up = f"\x1b[{self._drawn}F" if self._drawn else ""
        self._drawn = text.count("\n") + 1
        self._print(f"{up}\x1b[J{text}")

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def _counts(self) -> str:
        def count(fits: Callable[[Row], bool]) -> int:
            return sum(fits(row) for row in self._rows)

        done, runs = count(lambda r: r.state.startswith("finished")), count(lambda r: r.state == "runs")
        waits, wrong = count(lambda r: r.state == WAITS), count(lambda r: r.seconds is not None) - done
        parts = [f"{done}/{len(self._rows)} finished", f"{runs} run" if runs else "", f"{waits} wait" if waits else ""]
        return ", ".join(filter(None, [*parts, f"{wrong} did not finish" if wrong else ""]))

    def _rest(self) -> str:
        """The time that the other tasks will take if they take as long as those that ended."""
        took = [row.seconds for row in self._rows if row.seconds is not None]
        if not took or len(took) == len(self._rows):
            return ""
        mean = sum(took) / len(took)
        running = [time.monotonic() - row.began for row in self._rows if row.state == "runs"]
        waits = len(self._rows) - len(took) - len(running)
        left = (sum(max(0.0, mean - since) for since in running) + mean * waits) / self._jobs
        return f", about {duration(left)} left"


def _end(name: str, length: int) -> str:
    """A name cut to a length at its beginning: tasks of a sweep differ at the end of their names."""
    return name if len(name) <= length else f"...{name[3 - length :]}"


def _rank(row: Row) -> int:
    """What stays in a table that is too long."""
    if row.state == "runs":
        return 0
    return 3 if row.state.startswith("finished") else 2 if row.state == WAITS else 1


def figure_of(folder: Path) -> str:
    """The primary figure and the share of the cost of a finished run, by its report; empty if it cannot be read."""
    body: dict[str, Any] = read_json(folder / "report.json")
    try:
        task = body.get("task") or {"primary": "top1", "titles": {"top1": "top-1 %"}}
        key, title = task["primary"], str(task["titles"][task["primary"]])
        digits = "{:.2f}" if title.endswith("%") else "{:.4g}"
        dense, left = (digits.format(body[kind][key]) for kind in ("dense", "finetuned"))
        shares = ", ".join(f"{100 * share:.1f} % {name}" for name, share in _shares(body).items())
        return f"{title} {dense} -> {left}, {shares}"
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""


def _shares(body: dict[str, Any]) -> dict[str, float]:
    """Shares of the costs that were asked for, or of the MACs."""
    asked = {name: share for name, share in body["achieved"].items() if name in body["target"]}
    return asked or {"macs": body["achieved"]["macs"]}


def last_error(folder: Path) -> str:
    """The last line of a run's error, else of what it printed; a run that was stopped says so there."""
    files = sorted((folder / "errors").glob("rank_*.json"))
    text = str(read_json(files[0]).get("error", "")) if files else ""
    with contextlib.suppress(OSError):
        if not text.strip():
            with (folder / LOG).open("rb") as log:
                log.seek(max(0, log.seek(0, 2) - 10_000))
                text = log.read().decode(errors="replace")
    return last_line(text)

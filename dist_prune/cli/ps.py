"""``dist-prune ps``: the runs that run now, with host, process, ranks, stage, time left and their last sign of life."""

import argparse
import os
import socket
import time
from pathlib import Path
from typing import Any

from dist_prune.cli.status import LOCK, RECIPE, ago, aligned, describe, is_locked, run_directories
from dist_prune.cli.verb import Answer
from dist_prune.errors import PruneError
from dist_prune.fileio import read_json
from dist_prune.training.progress import duration

RECENT_S = 120.0  # a run of another host, whose lock may not be visible here, is listed if a file is as new as that


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument(
        "runs", nargs="*", help="run directories, or folders of them (default: all of this machine, and runs)"
    )


def run(arguments: argparse.Namespace) -> Answer:
    """List the runs that run now, the one that began first above.

    Raises:
        PruneError: a folder is missing.
    """
    for name in arguments.runs:
        if not Path(name).is_dir():
            raise PruneError(f"there is no folder {name}; name a run directory, or a folder of run directories")
    places = [Path(name) for name in arguments.runs or ["runs"]]
    found = {folder.resolve(): folder for place in places if place.is_dir() for folder in run_directories(place)}
    here = of_this_machine()
    if not arguments.runs:
        found = {folder: _short(folder) for folder in here} | found
    rows = [row for whole, folder in found.items() if (row := live(folder, here.get(whole))) is not None]
    rows.sort(key=lambda row: (row["began"] is None, row["began"], row["run"]))
    if not rows:
        where = f"below {', '.join(arguments.runs)}" if arguments.runs else "on this machine"
        return f"nothing runs {where}", [], 0
    head = ["run", "host", "process", "ranks", "for", "stage", "work", "left", "last sign"]
    cells = [[_cell(key, row) for key in ("run", "host", "pid", "ranks", "began")] for row in rows]
    for row, line in zip(rows, cells, strict=True):
        left = "" if row["seconds_left"] is None else duration(row["seconds_left"])
        line += [row["stage"], row["work"], left, ago(row["seconds_ago"])]
    return aligned([head, *cells]), rows, 0


def _cell(key: str, row: dict[str, Any]) -> str:
    value = row[key]
    if value is None:
        return "?"
    if key == "host":
        return str(value) if row["locked"] else f"{value} ?"
    return duration(max(0.0, time.time() - value)) if key == "began" else str(value)


def live(folder: Path, process: int | None = None) -> dict[str, Any] | None:
    """A run directory in which a process runs; None if none does.

    Args:
        folder: the run directory.
        process: a process of this machine that has its lock open.

    Returns:
        What ``status.describe`` says, and ``host``, ``pid``, ``ranks``, ``began`` (seconds since 1970) of the first
        rank, None where an earlier version has not noted them. ``locked`` is false if the run is on another host, its
        lock is not visible here, and it is taken for a running one because its files are new.
    """
    note = read_json(folder / LOCK)
    locked = is_locked(folder / LOCK)
    if not locked:
        other = isinstance(note.get("host"), str) and note["host"] != socket.gethostname()
        before = describe(folder, running=False)
        if not other or before["state"] != "stopped" or before["seconds_ago"] > RECENT_S:
            return None
    elif not note and process is not None:
        note = {"host": socket.gethostname(), "pid": process}
    body = describe(folder, running=True)
    known: dict[str, Any] = {}
    for key, kind in (("host", str), ("pid", int), ("ranks", int), ("began", int | float)):
        known[key] = note[key] if isinstance(note.get(key), kind) else None
    del body["error"]
    return body | known | {"locked": locked}


def of_this_machine() -> dict[Path, int]:
    """Run directory -> process that has its lock open, as far as this user may see the processes (Linux)."""
    found: dict[Path, int] = {}
    for process in sorted(int(folder.name) for folder in Path("/proc").glob("[0-9]*")):  # a rank before its workers
        try:
            targets = [os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir()]
        except OSError:  # another user's process, or one that has ended
            continue
        for target in targets:
            folder = Path(target).parent
            if target.endswith(f"/{LOCK}") and (folder / RECIPE).is_file():
                found.setdefault(folder, process)
    return found


def _short(folder: Path) -> Path:
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder

"""``dist-prune status``: the runs below a folder, with the stage of each, how long it takes, and the last error."""

import argparse
import fcntl
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_prune.cli.verb import Answer
from dist_prune.errors import PruneError
from dist_prune.fileio import read_json, read_text, unseal
from dist_prune.training.progress import duration

RECIPE, LOCK, LEDGER, STARTED = "recipe.yaml", ".lock", "ledger.jsonl", "stage_started.json"
PROGRESS = "progress.json"
NOT_BEGUN = "not begun"
DEPTH = 3  # folders below RUNS that are searched: runs/SWEEP/TASK
LONGEST = 100  # characters of an error in the table; --json has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("runs", nargs="*", default=["runs"], help="run directories, or folders of them (default: runs)")


def run(arguments: argparse.Namespace) -> Answer:
    """List the runs: those that run first, then those that failed or stopped, then the finished ones.

    Raises:
        PruneError: a folder is missing.
    """
    folders = []
    for name in arguments.runs:
        root = Path(name)
        if not root.is_dir():
            raise PruneError(f"there is no folder {root}; name a run directory, or a folder of run directories")
        folders += [folder for folder in run_directories(root) if folder not in folders]
    order = {"running": 0, "failed": 1, "stopped": 2, "finished": 3}
    found = sorted((describe(folder) for folder in folders), key=lambda one: (order[one["state"]], one["run"]))
    if not found:
        return f"no run directory below {', '.join(arguments.runs)}", [], 0
    rows = [["run", "state", "stage", "done", "work", "left", "last sign", "error"]]
    rows += [
        [one["run"], one["state"], one["stage"], f"{one['done']}", one["work"],
         "" if one["seconds_left"] is None else duration(one["seconds_left"]), ago(one["seconds_ago"]),
         last_line(one["error"])]
        for one in found
    ]  # fmt: skip
    return aligned(rows), found, 0


def run_directories(root: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The run directories at and below a folder, in text order; none is searched for further ones."""
    if (root / RECIPE).is_file() and (root / LOCK).exists():
        yield root
    elif depth:
        for folder in sorted(root.iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                yield from run_directories(folder, depth - 1)


def describe(folder: Path, running: bool | None = None) -> dict[str, Any]:
    """State of a run directory; it is only read.

    Args:
        folder: the run directory.
        running: whether a process runs there; None: its lock tells.

    Returns:
        ``run`` (its path), ``state`` (running: a process holds its lock; finished: its report is written; failed: it
        left an error; stopped: none of these), ``stage`` (the one that runs or was interrupted, else the last one
        done), ``done`` (stages in the ledger), ``work`` and ``seconds_left`` (what a running one is at, as ``train
        3/40``, and how long that will take; empty and None in the first seconds), ``seconds_ago`` (since a file
        changed), ``error`` (of the lowest rank).
    """
    lines = [line for line in map(unseal, read_text(folder / LEDGER).splitlines()) if line and "stage" in line]
    last = lines[-1]["stage"] if lines else ""
    started = read_json(folder / STARTED).get("stage", "")
    errors = sorted((folder / "errors").glob("rank_*.json"))
    error = str(read_json(errors[0]).get("error", "")) if errors else ""
    running = is_locked(folder / LOCK) if running is None else running
    finished = last == "report"
    state = "running" if running else "finished" if finished else "failed" if errors else "stopped"
    work, left = progress_of(folder) if running else ("", None)
    times = [file.stat().st_mtime for file in folder.iterdir() if file.is_file()]
    return {
        "run": str(folder),
        "state": state,
        "stage": last if finished and not running else str(started or last or NOT_BEGUN),
        "done": len({line["stage"] for line in lines}),
        "work": work,
        "seconds_left": left,
        "seconds_ago": max(0.0, time.time() - max(times, default=time.time())),
        "error": error if state == "failed" else "",
    }


def progress_of(folder: Path) -> tuple[str, float | None]:
    """What the running stage of a run directory is at, and the seconds that it will take; "" and None if unknown."""
    body = read_json(folder / PROGRESS)
    try:
        if body["at"] < (folder / STARTED).stat().st_mtime:  # of an earlier stage
            return "", None
        left = max(0.0, float(body["seconds_left"]) - (time.time() - float(body["at"])))
        return f"{str(body['what'])[:LONGEST]} {int(body['done'])}/{int(body['total'])}", left
    except (KeyError, TypeError, ValueError, OSError):
        return "", None


def is_locked(file: Path) -> bool:
    """Whether a process holds the lock of a run directory, as far as the file system tells."""
    try:
        with file.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks, or a file that is gone
        return False
    return False


def last_line(text: str) -> str:
    """The last line of a text, cut to ``LONGEST`` characters."""
    line = text.strip().splitlines()[-1] if text.strip() else ""
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table whose columns are as wide as their widest cells, the last one excepted."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows
    )


def ago(seconds: float) -> str:
    """The age of a sign of life: ``12 s ago``, ``3 h ago``."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{seconds:.0f} s ago"

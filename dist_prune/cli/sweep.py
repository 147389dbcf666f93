"""``dist-prune sweep``: the numbered tasks of a sweep file, listed or run on this machine."""

import argparse
import heapq
import shutil
from pathlib import Path
from typing import Any

from dist_prune.cli.status import NOT_BEGUN, describe
from dist_prune.cli.sweep_board import LOG
from dist_prune.cli.sweep_run import Sweep
from dist_prune.cli.verb import Answer, check_range
from dist_prune.config.sweep import choose_run, load_sweep
from dist_prune.distributed.watchdog import EXIT_CODE
from dist_prune.errors import MISSED
from dist_prune.fileio import read_text, unseal
from dist_prune.training.progress import duration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("file", help="a YAML file, or a name in recipes/sweeps")
    parser.add_argument("--run", action="store_true", help="run the tasks here, each in a process of its own")
    parser.add_argument("--jobs", type=int, default=1, help="with --run: tasks at a time, which share the cores")
    parser.add_argument("--dry-run", action="store_true", help="say what --run would do, how long and how much disk")


def run(arguments: argparse.Namespace) -> Answer:
    """List a sweep's tasks by number and name, or run them; the same command goes on where it was stopped."""
    tasks = load_sweep(arguments.file, need_environment=False).tasks
    body: list[dict[str, Any]] = [
        {"task": task.number, "name": task.name, "base": task.base, "overrides": list(task.overrides)} for task in tasks
    ]
    if not (arguments.run or arguments.dry_run):
        return "\n".join(f"{task.number:4}  {task.name}" for task in tasks), body, 0
    check_range("--jobs", arguments.jobs, 4096)
    for entry in body:
        folder = choose_run(None, arguments.file, entry["task"], [], need_environment=False)[1]
        entry["run"] = str(folder)
        entry["state"] = describe(Path(folder))["state"] if (Path(folder) / "ledger.jsonl").is_file() else NOT_BEGUN
    if arguments.dry_run:
        width = max(len(entry["name"]) for entry in body)
        lines = [f"{entry['task']:4}  {entry['name']:{width}}  {entry['state']}" for entry in body]
        left = sum(entry["state"] != "finished" for entry in body)
        lines += ["", f"{left} of {len(body)} would be run or resumed"]
        lines += [_estimate(body, arguments.jobs)] if left else []
        return "\n".join(lines), body, 0
    return _run_all(arguments.file, body, arguments.jobs)


def _estimate(body: list[dict[str, Any]], jobs: int) -> str:
    """How long the other tasks take and how much disk they need, as measured on finished ones of their base recipe."""
    costs = {id(entry): _cost(Path(entry["run"])) for entry in body if entry["state"] == "finished"}
    if not costs:
        return "time and disk: not known before one task is finished here (run.py --sweep FILE --task N runs one)"
    left = [entry for entry in body if entry["state"] != "finished"]
    known: dict[str, list[tuple[float, int]]] = {"": list(costs.values())}
    for entry in body:
        if id(entry) in costs:
            known.setdefault(entry["base"], []).append(costs[id(entry)])
    means = {base: tuple(sum(part) / len(part) for part in zip(*some, strict=True)) for base, some in known.items()}
    each = [means.get(entry["base"], means[""]) for entry in left]
    free_at = [0.0] * jobs  # each task goes to the place that is free first, as it will be run
    for seconds, _ in each:
        heapq.heapreplace(free_at, free_at[0] + seconds)
    mean_s, mean_size = means[""]
    folder = next(parent for parent in Path(body[0]["run"]).resolve().parents if parent.is_dir())
    free, size = shutil.disk_usage(folder).free, sum(size for _, size in each)
    unlike = sorted({entry["base"] for entry in left} - known.keys())
    return (
        f"a finished task took {duration(mean_s)} and {mean_size / 2**20:,.1f} MiB here (mean of {len(costs)}): the "
        f"others about {duration(max(free_at))} with --jobs {jobs} if each task has as many cores as "
        f"those had, and {size / 2**20:,.0f} MiB of {free / 2**20:,.0f} free"
        + (f"; no task of {', '.join(unlike)} is finished yet: it may take another time" if unlike else "")
    )


def _cost(folder: Path) -> tuple[float, int]:
    """Seconds of a finished run's stages by its ledger, and bytes of its files."""
    lines = [line for line in map(unseal, read_text(folder / "ledger.jsonl").splitlines()) if line and "stage" in line]
    seconds = {line["stage"]: line.get("seconds", 0.0) for line in lines}
    return sum(seconds.values()), sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _run_all(file: str, body: list[dict[str, Any]], jobs: int) -> Answer:
    """Run every task; a finished one takes as long as its check."""
    stopped = Sweep(file, body, jobs).run()
    width = max(len(entry["name"]) for entry in body)
    lines = [f"{entry['task']:4}  {entry['name']:{width}}  {entry['state']:24}  {entry['run']}" for entry in body]
    wrong = [entry for entry in body if entry["code"] not in (0, MISSED)]
    if stopped:
        lines += ["", "stopped; the same command goes on from here"]
    elif wrong:
        lines += ["", f"{len(wrong)} did not finish; what each printed is in {LOG} in its run directory"]
    else:
        lines += ["", f"next    dist-prune compare {Path(body[0]['run']).parent}"]
    return "\n".join(lines), body, EXIT_CODE if stopped else 1 if wrong else 0

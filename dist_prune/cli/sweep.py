"""``dist-prune sweep``: the numbered tasks of a sweep file, listed or run on this machine."""

import argparse
from pathlib import Path
from typing import Any

from dist_prune.cli.status import NOT_BEGUN, describe
from dist_prune.cli.sweep_board import LOG
from dist_prune.cli.sweep_estimate import estimate
from dist_prune.cli.sweep_run import Sweep
from dist_prune.cli.verb import Answer, check_range
from dist_prune.config.sweep import choose_run, load_sweep
from dist_prune.distributed.watchdog import EXIT_CODE
from dist_prune.errors import MISSED


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
    recipes = {}
    for entry in body:
        recipe, folder = choose_run(None, arguments.file, entry["task"], [], need_environment=False)
        recipes[entry["task"]] = recipe
        entry["run"] = str(folder)
        entry["state"] = describe(Path(folder))["state"] if (Path(folder) / "ledger.jsonl").is_file() else NOT_BEGUN
    if arguments.dry_run:
        width = max(len(entry["name"]) for entry in body)
        lines = [f"{entry['task']:4}  {entry['name']:{width}}  {entry['state']}" for entry in body]
        left = sum(entry["state"] != "finished" for entry in body)
        lines += ["", f"{left} of {len(body)} would be run or resumed"]
        lines += [estimate(body, recipes, arguments.jobs)] if left else []
        return "\n".join(lines), body, 0
    return _run_all(arguments.file, body, arguments.jobs)


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

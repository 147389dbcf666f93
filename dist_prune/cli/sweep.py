"""``dist-prune sweep``: the numbered tasks of a sweep file."""

import argparse

from dist_prune import methods
from dist_prune.cli.verb import Answer
from dist_prune.config.sweep import load_sweep

HELP = "list the numbered tasks of a sweep file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("file", help="a YAML file, or a name in recipes/sweeps")


def run(arguments: argparse.Namespace) -> Answer:
    """List a sweep's tasks by number and name."""
    tasks = load_sweep(arguments.file, methods.options_of, need_environment=False).tasks
    body = [
        {"task": task.number, "name": task.name, "base": task.base, "overrides": list(task.overrides)} for task in tasks
    ]
    return "\n".join(f"{task.number:4}  {task.name}" for task in tasks), body, 0

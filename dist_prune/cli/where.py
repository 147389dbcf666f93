"""``dist-prune where``: the run directory of a recipe, or of one task of a sweep."""

import argparse

from dist_prune.cli.verb import Answer, add_overrides
from dist_prune.config.sweep import choose_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--recipe", help="a YAML file, or a name in recipes/")
    choice.add_argument("--sweep", help="a sweep file, or a name in recipes/sweeps")
    parser.add_argument("--task", type=int, help="number of the sweep's task (default: $SLURM_ARRAY_TASK_ID)")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> Answer:
    """Print the folder that a run with these arguments uses."""
    _, run_dir = choose_run(
        arguments.recipe, arguments.sweep, arguments.task, arguments.overrides, need_environment=False
    )
    return str(run_dir), {"folder": str(run_dir)}, 0

"""``dist-prune run``: a recipe in one process, as ``python dist_prune/run.py --recipe RECIPE`` runs it."""

import argparse
from pathlib import Path

from dist_prune.cli.verb import Answer, add_overrides
from dist_prune.errors import PruneError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("recipe", nargs="?", help="a YAML file, or a name in recipes/")
    add_overrides(parser)
    parser.add_argument("--run-dir", help="the run directory (default: runs/<recipe's name>)")
    parser.add_argument("--seed", type=int, help="value of the recipe's seed key")
    parser.add_argument("--quiet", action="store_true", help="print errors and a missed target only")


def run(arguments: argparse.Namespace) -> Answer:
    """Run the recipe; the same command resumes a run that was stopped anywhere. A launcher may start it, too.

    Raises:
        PruneError: no recipe is named, or ``--json`` was asked for.
    """
    if arguments.recipe is None or ("=" in arguments.recipe and not Path(arguments.recipe).is_file()):
        raise PruneError(
            "run: name a recipe, a file or a name, before its keys: dist-prune run quickstart ('dist-prune list "
            "recipes' shows what there is). For your own images: dist-prune new --data FOLDER --backbone NAME"
        )
    if arguments.json:
        raise PruneError("--json: a run has no short answer; read report.json in its run directory")
    from dist_prune.run import main

    words = ["--recipe", arguments.recipe, *arguments.overrides]
    words += ["--run-dir", arguments.run_dir] if arguments.run_dir else []
    words += ["--seed", str(arguments.seed)] if arguments.seed is not None else []
    words += ["--quiet"] if arguments.quiet else []
    return "", None, main(words)

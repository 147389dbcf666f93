"""``dist-prune report``: the result of a finished run as a table."""

import argparse
from pathlib import Path

from dist_prune.cli.deferred_imports import import_without_compiler
from dist_prune.cli.verb import Answer
from dist_prune.config import safe_parsing
from dist_prune.errors import PruneError, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("run", help="a run directory")


def run(arguments: argparse.Namespace) -> Answer:
    """Show the table of a run's report.

    Raises:
        PruneError: if the run directory has no report, or a damaged one.
    """
    file = Path(arguments.run) / "report.json"
    if not file.is_file():
        raise PruneError(f"{arguments.run} holds no report.json: no run has finished there yet")
    import_without_compiler(timm=False)
    from dist_prune.report.tables import table  # torch takes seconds to import

    try:
        body = safe_parsing.read_json(file)
        text = f"{body['name']}, plan {body['plan']['fingerprint'][:16]}\n\n{table(body)}"
    except Exception as error:  # values of other types make the table fail in many ways
        raise PruneError(f"{file} is damaged: {shown(error)}; run the recipe again to write it anew") from error
    return text, body, 0

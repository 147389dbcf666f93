"""A run of a recipe that a verb composes: loaded like a file, run by the pipeline, in one process or many."""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dist_prune import methods
from dist_prune.cli.verb import Answer
from dist_prune.config import loading
from dist_prune.config.recipe import Recipe
from dist_prune.errors import PruneError
from dist_prune.fileio import read_json
from dist_prune.report.tables import kinds_of, metric_rows


def load_tree(tree: Mapping[str, Any], words: Sequence[str]) -> Recipe:
    """Validate a recipe of plain values with overrides, as if it were a file.

    Args:
        tree: section or key -> value, with ``name``.
        words: ``key=value`` overrides.

    Raises:
        PruneError: with a line for each error.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{tree['name']}.yaml"
        file.write_text(yaml.safe_dump(dict(tree), sort_keys=False))
        try:
            return loading.load(str(file), list(words), methods.options_of)
        except PruneError as error:  # the file is gone when the error is read
            own = f"the recipe {tree['name']!r} of these options"
            raise type(error)(str(error).replace(str(file), own)) from error


def parse_target(text: str) -> dict[str, float]:
    """Read ``macs=0.5`` as a recipe's target section.

    Raises:
        PruneError: it is no ``cost=share``.
    """
    name, equals, share = text.partition("=")
    try:
        kept = float(share)
    except ValueError:
        equals, kept = "", 0.0
    if not equals:
        raise PruneError(f"--target: write COST=SHARE, for example macs=0.5, got {text!r}")
    return {name: kept}


def run_recipe(
    recipe: Recipe,
    output: Path,
    arguments: argparse.Namespace,
    networks: Mapping[str, str],
    end: str,
    before: Callable[[Path, Any], None] | None = None,
) -> Answer:
    """Run a recipe to its end on all processes of the launcher, and answer with its table on the first.

    Args:
        recipe: the recipe; the run directory keeps it.
        output: the run directory.
        arguments: the verb's command line, for ``--json``.
        networks: columns of the table: ``dense``, ``pruned`` or ``finetuned`` -> its title.
        end: the last lines of the answer, with ``{bundle}`` for the bundle's folder.
        before: called on all processes with the run directory and the environment, before the run.
    """
    from dist_prune.run import execute, run

    def work(chosen: Recipe, folder: Path, environment: Any) -> str:
        with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
            if before is not None:
                before(folder, environment)
            missed = run(chosen, folder, environment)
        if environment.comm.is_main:  # now: processes of one run leave together, without returning here
            text, answer = _answer(output, chosen, networks, end)
            print(json.dumps(answer, indent=1) if arguments.json else text, flush=True)
        return missed

    return "", None, execute(lambda: (recipe, output), str(output), work)


def _answer(output: Path, recipe: Recipe, networks: Mapping[str, str], end: str) -> tuple[str, dict[str, Any]]:
    """The table and the last lines of a finished run, and the same as values."""
    body, bundle = read_json(output / "report.json"), output / "export"
    kinds = kinds_of(body)
    chosen = [kinds.index(name) for name in networks]
    rows = [("", list(networks.values()))]
    rows += [(label, [cells[number] for number in chosen]) for label, cells in metric_rows(body)]
    width = max(len(label) for label, _ in rows)
    table = [f"{label:{width}}  " + "  ".join(f"{cell:>18}" for cell in cells) for label, cells in rows]
    figures = {title: body[name] for name, title in networks.items()}
    answer = {"bundle": str(bundle), "run": str(output), "method": recipe.method["name"], "figures": figures}
    return "\n".join([*table, "", end.replace("{bundle}", str(bundle))]), answer

"""``dist-prune launch``: the SLURM batch script of a recipe or of all tasks of a sweep."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from dist_prune import methods
from dist_prune.cli.verb import Answer
from dist_prune.config import sweep
from dist_prune.errors import PruneError, shown

HELP = "write or submit the batch script that runs a recipe or a sweep on a cluster"
HEADER_END = "# One run on"  # the first line of slurm/run.sbatch after its #SBATCH lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("words", nargs="*", metavar="RECIPE key=value", help="a recipe (not with --array) and its keys")
    parser.add_argument("--slurm", action="store_true", required=True, help="write a script for SLURM")
    parser.add_argument("--array", metavar="SWEEP", help="a sweep file; each of its runs becomes one array task")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes of a run (default: 1)")
    parser.add_argument(
        "--gpus", type=int, default=1, help="number of GPUs, and of processes, on each node (default: 1; 0: CPUs only)"
    )
    parser.add_argument("--processes", type=int, help="number of processes on each node (default: one per GPU)")
    parser.add_argument("--accelerate", metavar="FILE", help="config file for a start by 'accelerate launch'")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="a further #SBATCH line; may be repeated"
    )
    parser.add_argument("--submit", action="store_true", help="submit the script by sbatch instead of printing it")


def run(arguments: argparse.Namespace) -> Answer:
    """Print the batch script, or submit it.

    Raises:
        PruneError: if the arguments contradict one another, the recipe is wrong, or sbatch is missing or refuses.
    """
    script = batch_script(arguments)
    if not arguments.submit:
        return script.rstrip("\n"), {"script": script}, 0
    try:
        result = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise PruneError(
            "--submit: there is no sbatch on this machine; log in to a node of the cluster that has it, or leave "
            "--submit out and take the printed script there"
        ) from error
    if result.returncode:
        raise PruneError(f"sbatch refused the job: {result.stderr.strip()}")
    job = result.stdout.strip().split(";")[0]
    return f"submitted as job {job}", {"job": job}, 0


def batch_script(arguments: argparse.Namespace) -> str:
    """The batch script: slurm/run.sbatch with this run's values in place of its defaults.

    Args:
        arguments: the verb's parsed command line.

    Raises:
        PruneError: if the arguments contradict one another, or the recipe or the sweep is wrong.
    """
    words = list(arguments.words)
    recipe_name = next((word for word in words if "=" not in word), None)
    _check(arguments, recipe_name)
    header = [
        "--job-name=dist_prune",
        f"--nodes={arguments.nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={arguments.gpus}"] if arguments.gpus else []),
        "--requeue",
        "--signal=USR1@180",
        "--open-mode=append",
    ]
    template = _template()
    code = template.parents[1] if (template.parents[1] / "dist_prune").is_dir() else Path.cwd()
    per_node = arguments.processes or arguments.gpus or 1
    variables = {"DIST_PRUNE_CODE": code, "PYTHON": sys.executable, "PER_NODE": per_node}
    if arguments.accelerate:
        variables["ACCELERATE_CONFIG"] = Path(arguments.accelerate).resolve()
    if arguments.array:
        tasks = sweep.load_sweep(arguments.array, methods.options_of, need_environment=False)
        variables["SWEEP"] = tasks.file.resolve()
        header += [f"--array=0-{len(tasks.tasks) - 1}", "--output=slurm-%A_%a.out"]
    else:
        words.remove(str(recipe_name))
        recipe = sweep.choose_run(recipe_name, None, None, words, methods.options_of, need_environment=False)[0]
        header += ["--output=slurm-%j.out"]
        header[0] += f"_{recipe.name}"
        words.insert(0, _absolute(str(recipe_name)))
    sbatch_lines = [f"#SBATCH {line}" for line in (*header, *arguments.sbatch)]
    exports = [f"export {key}={shlex.quote(str(value))}" for key, value in variables.items()]
    body = HEADER_END + template.read_text().partition(HEADER_END)[2]
    return "\n".join(["#!/bin/bash", *sbatch_lines, *exports, shlex.join(["set", "--", *words]), body])


def _check(arguments: argparse.Namespace, recipe_name: str | None) -> None:
    """Raise a ``PruneError`` for arguments that no script can be written from."""
    if arguments.array and recipe_name:
        raise PruneError(f"launch: a sweep names its recipes itself; leave out {recipe_name!r} or --array")
    if not arguments.array and not recipe_name:
        raise PruneError("launch: name a recipe, or --array SWEEP ('dist-prune list recipes' shows what there is)")
    for name in ("nodes", "gpus", "processes"):
        least, value = int(name != "gpus"), getattr(arguments, name)
        if value is not None and value < least:
            raise PruneError(f"--{name}: {value} is too few; at least {least}")
    if arguments.accelerate and not Path(arguments.accelerate).is_file():
        raise PruneError(f"--accelerate: there is no file {arguments.accelerate}; launch/ in a checkout has some")
    broken = [option for option in arguments.sbatch if not option.isprintable() or not option.strip()]
    if broken:
        raise PruneError(f"--sbatch: {shown(broken[0])} is no single line; each option has an --sbatch of its own")


def _absolute(recipe: str) -> str:
    path = Path(recipe)
    return str(path.resolve()) if path.is_file() else recipe


def _template() -> Path:
    """The batch script of the package: in a checkout's slurm/, or in the installed package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "slurm", package / "slurm"):
        if (folder / "run.sbatch").is_file():
            return folder / "run.sbatch"
    raise PruneError(f"slurm/run.sbatch is neither beside nor inside {package}; install dist_prune again")

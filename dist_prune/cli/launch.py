"""``dist-prune launch``: a config file of ``accelerate launch``, or the SLURM batch script of a recipe or a sweep."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from dist_prune.cli.verb import Answer
from dist_prune.config import sweep
from dist_prune.errors import PruneError, shown, unknown
from dist_prune.fileio import write_atomic

PACKAGE = Path(__file__).resolve().parents[1]
HEADER_END = "# One run on"  # the first line of slurm/run.sbatch after its #SBATCH lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("words", nargs="*", metavar="RECIPE key=value", help="a recipe (not with --array) and its keys")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument(
        "--config",
        metavar="NAME",
        help=f"print a config file for 'accelerate launch --config_file': {', '.join(configs())}",
    )
    form.add_argument("--slurm", action="store_true", help="write a script for SLURM")
    parser.add_argument("--to", metavar="FOLDER", help="with --config: copy the file into this folder")
    parser.add_argument("--array", metavar="SWEEP", help="a sweep file; each of its runs becomes one array task")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes of a run (default: 1)")
    parser.add_argument(
        "--gpus", type=int, default=1, help="number of GPUs, and of processes, on each node (default: 1; 0: CPUs only)"
    )
    parser.add_argument("--processes", type=int, help="number of processes on each node (default: one per GPU)")
    parser.add_argument("--accelerate", metavar="FILE", help="config file, or --config's name of one")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="a further #SBATCH line; may be repeated"
    )
    parser.add_argument("--submit", action="store_true", help="submit the script by sbatch instead of printing it")


def run(arguments: argparse.Namespace) -> Answer:
    """Print or copy a launch config; or print the batch script, or submit it.

    Raises:
        PruneError: if the arguments contradict one another, there is no such config, the recipe is wrong, or sbatch is
            missing or refuses.
    """
    if arguments.config is not None:
        return _config(arguments)
    if arguments.to is not None:
        raise PruneError("--to: it copies the file of --config; a batch script is printed: ... > run.sbatch")
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


def configs() -> dict[str, Path]:
    """Name -> file of each launch config of the package, sorted."""
    return {file.stem: file for file in sorted(_folder("launch").glob("*.yaml"))}


def find_config(name: str, argument: str) -> Path:
    """The launch config of a name.

    Args:
        name: with or without ``.yaml``.
        argument: the command-line argument, for the error.

    Raises:
        PruneError: there is none; the text has the nearest name and all of them.
    """
    found = configs()
    stem = name.removesuffix(".yaml")
    if stem not in found:
        raise PruneError(f"{argument}: {unknown('launch config', name, found)}")
    return found[stem]


def _config(arguments: argparse.Namespace) -> Answer:
    if arguments.words or arguments.array or arguments.submit or arguments.accelerate or arguments.sbatch:
        raise PruneError("--config prints a file as it is; recipes, --array, --submit and --sbatch go with --slurm")
    file = find_config(arguments.config, "--config")
    text = file.read_text()
    if arguments.to is None:
        return text.rstrip("\n"), {"config": file.stem, "text": text, "file": str(file)}, 0
    copy = Path(arguments.to).expanduser() / file.name
    if copy.exists() and copy.read_text(errors="replace") != text:
        raise PruneError(f"--to: {copy} exists and differs; move it, or name another folder")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PruneError(f"--to: {copy.parent} is no folder and cannot become one: {error.strerror}") from error
    write_atomic(copy, text)
    command = f"accelerate launch --config_file {shlex.quote(str(copy))} -m dist_prune.run --recipe NAME"
    return f"wrote {copy}\n{command}", {"config": file.stem, "text": text, "file": str(copy)}, 0


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
    from dist_prune import methods

    template = _template()
    code = template.parents[1] if (template.parents[1] / "dist_prune").is_dir() else Path.cwd()
    per_node = arguments.processes or arguments.gpus or 1
    variables = {"DIST_PRUNE_CODE": code, "PYTHON": sys.executable, "PER_NODE": per_node}
    if arguments.accelerate:
        variables["ACCELERATE_CONFIG"] = _accelerate_file(arguments.accelerate).resolve()
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
    if arguments.accelerate:
        _accelerate_file(arguments.accelerate)
    broken = [option for option in arguments.sbatch if not option.isprintable() or not option.strip()]
    if broken:
        raise PruneError(f"--sbatch: {shown(broken[0])} is no single line; each option has an --sbatch of its own")


def _absolute(recipe: str) -> str:
    path = Path(recipe)
    return str(path.resolve()) if path.is_file() else recipe


def _template() -> Path:
    """The batch script of the package."""
    file = _folder("slurm") / "run.sbatch"
    if not file.is_file():
        raise PruneError(f"slurm/run.sbatch is neither beside nor inside {PACKAGE}; install dist_prune again")
    return file


def _accelerate_file(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.is_file():
        return path
    if len(path.parts) > 1:
        raise PruneError(f"--accelerate: there is no file {path}; 'dist-prune launch --config NAME' prints some")
    return find_config(name_or_path, "--accelerate")


def _folder(name: str) -> Path:
    """A folder of files beside the code: of the checkout, or of the installed package."""
    checkout = PACKAGE.parent / name
    return checkout if (PACKAGE.parent / "pyproject.toml").is_file() and checkout.is_dir() else PACKAGE / name

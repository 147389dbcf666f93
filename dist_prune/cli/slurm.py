"""``dist-prune sweep | where | launch``: what a sweep holds, where a run lives, the script that SLURM is handed."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from dist_prune import methods
from dist_prune.config import sweep
from dist_prune.errors import PruneError, shown

HEADER_END = "# One run on"  # the first line of slurm/run.sbatch behind its #SBATCH lines
Answer = tuple[str, Any, int]


def add_arguments(verbs: Any) -> None:
    """Add the verbs to ``dist-prune``'s parser."""
    listing = verbs.add_parser("sweep", help="the numbered tasks of a sweep file")
    listing.add_argument("file", help="a YAML file, or a name in recipes/sweeps")
    placing = verbs.add_parser("where", help="the run directory of a recipe or of a sweep's task")
    what = placing.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe")
    what.add_argument("--sweep")
    placing.add_argument("--task", type=int)
    placing.add_argument("overrides", nargs="*", metavar="key=value", help="the recipe's keys, as run.py takes them")
    launching = verbs.add_parser("launch", help="the script that runs a recipe, or all tasks of a sweep, on a cluster")
    launching.add_argument("words", nargs="*", metavar="RECIPE key=value", help="a recipe (not with --array), its keys")
    launching.add_argument("--slurm", action="store_true", required=True, help="for SLURM")
    launching.add_argument("--array", metavar="SWEEP", help="one array task for each run of a sweep file")
    launching.add_argument("--nodes", type=int, default=1, help="nodes of a run (default 1)")
    launching.add_argument("--gpus", type=int, default=1, help="GPUs, and processes, on each node (default 1; 0: CPUs)")
    launching.add_argument("--processes", type=int, help="processes on each node, where they are not the GPUs")
    launching.add_argument("--accelerate", metavar="FILE", help="start by 'accelerate launch' with this config")
    launching.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="an own #SBATCH line")
    launching.add_argument("--submit", action="store_true", help="hand it to sbatch instead of printing it")


def _sweep(given: argparse.Namespace) -> Answer:
    found = sweep.load_sweep(given.file, methods.options_of, need_environment=False)
    body = [{"task": t.number, "name": t.name, "base": t.base, "overrides": list(t.overrides)} for t in found.tasks]
    return "\n".join(f"{t.number:4}  {t.name}" for t in found.tasks), body, 0


def _where(given: argparse.Namespace) -> Answer:
    place = str(sweep.choose_run(given.recipe, given.sweep, given.task, given.overrides, need_environment=False)[1])
    return place, {"folder": place}, 0


def _launch(given: argparse.Namespace) -> Answer:
    text = batch_script(given)
    if not given.submit:
        return text.rstrip("\n"), {"script": text}, 0
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise PruneError(
            "--submit: there is no sbatch on this machine; log in to a node of the cluster that has it, or leave "
            "--submit out and take the printed script there"
        ) from error
    if done.returncode:
        raise PruneError(f"sbatch refused the job: {done.stderr.strip()}")
    job = done.stdout.strip().split(";")[0]
    return f"submitted as job {job}", {"job": job}, 0


def batch_script(given: argparse.Namespace) -> str:
    """The batch script: slurm/run.sbatch with this run's values in the place of its defaults."""
    words, first = list(given.words), next((word for word in given.words if "=" not in word), None)
    if given.array and first:
        raise PruneError(f"launch: a sweep names its recipes itself; leave out {first!r} or --array")
    if not given.array and not first:
        raise PruneError("launch: name a recipe, or --array SWEEP ('dist-prune list recipes' shows what there is)")
    for name in ("nodes", "gpus", "processes"):
        least, value = int(name != "gpus"), getattr(given, name)
        if value is not None and value < least:
            raise PruneError(f"--{name}: {value} is too few; at least {least}")
    lines = [
        "--job-name=dist_prune", f"--nodes={given.nodes}", "--ntasks-per-node=1",
        *([f"--gpus-per-node={given.gpus}"] if given.gpus else []), "--requeue",
        "--signal=USR1@180", "--open-mode=append",
    ]  # fmt: skip
    template = _template()
    code = template.parents[1] if (template.parents[1] / "dist_prune").is_dir() else Path.cwd()
    values = {"DIST_PRUNE_CODE": code, "PYTHON": sys.executable, "PER_NODE": given.processes or given.gpus or 1}
    if given.accelerate:
        if not Path(given.accelerate).is_file():
            raise PruneError(f"--accelerate: there is no file {given.accelerate}; launch/ in a checkout has some")
        values["ACCELERATE_CONFIG"] = Path(given.accelerate).resolve()
    if given.array:
        found = sweep.load_sweep(given.array, methods.options_of, need_environment=False)
        values["SWEEP"] = found.file.resolve()
        lines += [f"--array=0-{len(found.tasks) - 1}", "--output=slurm-%A_%a.out"]
    else:
        words.remove(str(first))
        recipe = sweep.choose_run(first, None, None, words, methods.options_of, need_environment=False)[0]
        lines += ["--output=slurm-%j.out"]
        lines[0] += f"_{recipe.name}"
        words.insert(0, _absolute(str(first)))
    broken = [option for option in given.sbatch if not option.isprintable() or not option.strip()]
    if broken:
        raise PruneError(f"--sbatch: {shown(broken[0])} is no single line; each option has an --sbatch of its own")
    header = [f"#SBATCH {line}" for line in (*lines, *given.sbatch)]
    exports = [f"export {key}={shlex.quote(str(value))}" for key, value in values.items()]
    body = HEADER_END + template.read_text().partition(HEADER_END)[2]
    return "\n".join(["#!/bin/bash", *header, *exports, shlex.join(["set", "--", *words]), body])


def _absolute(recipe: str) -> str:
    path = Path(recipe)
    return str(path.resolve()) if path.is_file() else recipe


def _template() -> Path:
    here = Path(__file__).resolve().parents[1]
    for folder in (here.parent / "slurm", here / "slurm"):
        if (folder / "run.sbatch").is_file():
            return folder / "run.sbatch"
    raise PruneError(f"slurm/run.sbatch is neither beside nor inside {here}; install dist_prune again")


ACTS = {"sweep": _sweep, "where": _where, "launch": _launch}

"""``dist-prune launch --slurm``: slurm/run.sbatch with a recipe's or a sweep's values in place of its defaults."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from dist_prune.cli import launch_job
from dist_prune.cli.launch_job import PACKAGE, find_config, package_folder
from dist_prune.cli.verb import Answer
from dist_prune.config import sweep
from dist_prune.errors import PruneError, shown

HEADER_END = "# One run on"  # the first line of slurm/run.sbatch after its #SBATCH lines
ENGINES = ("pyxis", "apptainer")
APPTAINER = (".sif", ".simg")  # files of images
APPTAINER_SCHEMES = ("docker://", "library://", "oras://", "shub://")
# SLURM's forms: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S
TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d{1,2}(:\d\d){0,2}")


def batch_script(arguments: argparse.Namespace) -> str:
    """The batch script of a recipe, or of all tasks of a sweep.

    Args:
        arguments: the verb's parsed command line.

    Raises:
        PruneError: if the arguments contradict one another, or the recipe or the sweep is wrong.
    """
    words = list(arguments.words)
    name = launch_job.recipe_word(words)
    _check(arguments, name)
    per_node = launch_job.processes(arguments)
    variables: dict[str, Any] = {"DIST_PRUNE_CODE": _code(), "PYTHON": sys.executable, "PER_NODE": per_node}
    folders = []  # that a container has to see
    if arguments.accelerate:
        variables["ACCELERATE_CONFIG"] = _accelerate_file(arguments.accelerate).resolve()
        folders.append(variables["ACCELERATE_CONFIG"].parent)
    if arguments.array:
        from dist_prune import methods

        tasks = sweep.load_sweep(arguments.array, methods.options_of, need_environment=False)
        variables["SWEEP"] = tasks.file.resolve()
        folders.append(variables["SWEEP"].parent)
        cpus = launch_job.cores(arguments, launch_job.recipes_of(tasks, words))
        limit = f"%{arguments.jobs}" if arguments.jobs else ""
        title, output = "", [f"--array=0-{len(tasks.tasks) - 1}{limit}", "--output=slurm-%A_%a.out"]
    else:
        job = launch_job.read_job(arguments)
        cpus, words = job.cpus, [job.word, *job.overrides]
        folders += [job.file.parent] if job.file else []
        title, output = f"_{job.recipe.name}", ["--output=slurm-%j.out"]
    if arguments.container:
        variables |= _container(arguments, folders)
    lines = [f"#SBATCH {line}" for line in (*_header(arguments, title, cpus), *output, *arguments.sbatch)]
    exports = [f"export {key}={shlex.quote(str(value))}" for key, value in variables.items()]
    body = HEADER_END + _template().read_text().partition(HEADER_END)[2]
    return "\n".join(["#!/bin/bash", *lines, *exports, shlex.join(["set", "--", *words]), body])


def submit(script: str) -> Answer:
    """Hand a batch script to sbatch.

    Raises:
        PruneError: sbatch is missing or refuses.
    """
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


def _header(arguments: argparse.Namespace, title: str, cpus: int) -> list[str]:
    """The #SBATCH options that this command knows; those of --sbatch come after and replace them."""
    return [
        f"--job-name=dist_prune{title}",
        f"--nodes={arguments.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={cpus}",
        *([f"--gpus-per-node={arguments.gpus}"] if arguments.gpus else []),
        *([f"--mem={_memory(arguments.mem)}"] if arguments.mem else []),
        *(
            f"--{name}={getattr(arguments, name)}"
            for name in ("time", "account", "qos", "partition")
            if getattr(arguments, name)
        ),
        *(["--exclusive"] if arguments.exclusive else []),
        "--requeue",
        f"--signal=USR1@{launch_job.GRACE_S}",
        "--open-mode=append",
    ]


def _memory(text: str) -> str:
    """A size as sbatch takes it: a whole number of MiB or of a larger unit."""
    launch_job.memory_gib(text)
    return re.sub(r"i?B$", "", text, flags=re.IGNORECASE).upper()


def _container(arguments: argparse.Namespace, folders: list[Path]) -> dict[str, Any]:
    """The variables of slurm/run.sbatch for a container; ``folders`` are seen at the same place inside."""
    image = arguments.container
    by_name = image.endswith(APPTAINER) or image.startswith(APPTAINER_SCHEMES)
    engine = arguments.engine or ("apptainer" if by_name else "pyxis")
    if engine == "pyxis" and image.endswith(APPTAINER):
        raise PruneError(
            f"--engine: {image} is an image of apptainer, which pyxis does not start. Leave --engine out, or write "
            "--engine apptainer; pyxis takes an image of a registry (nvcr.io#nvidia/pytorch) or a .sqsh file"
        )
    if engine == "apptainer" and not by_name and "/" in image and not Path(image).exists():
        raise PruneError(
            f"--container: apptainer takes a file or an address with a scheme, for example docker://{image}"
        )
    mounts = list(dict.fromkeys([f"{_code()}:{_code()}", *(f"{folder}:{folder}" for folder in folders)]))
    for mount in arguments.mount:
        source, _, target = mount.partition(":")
        if not source.startswith("/") or not (target or source).startswith("/"):
            raise PruneError(f"--mount: {shown(mount)}: write /FOLDER, or /FOLDER:/ITS/PLACE/INSIDE")
        mounts.append(f"{source}:{target or source}")
    return {
        "CONTAINER": str(Path(image).resolve()) if Path(image).is_file() else image,
        "CONTAINER_ENGINE": engine,
        "CONTAINER_MOUNTS": ",".join(mounts),
        "CONTAINER_GPUS": arguments.gpus,
        "PYTHON": "python",  # the container's
    }


def _check(arguments: argparse.Namespace, recipe_name: str | None) -> None:
    """Raise a ``PruneError`` for arguments that no script can be written from."""
    if arguments.array and recipe_name:
        raise PruneError(f"launch: a sweep names its recipes itself; leave out {recipe_name!r} or --array")
    if not arguments.array and not recipe_name:
        raise PruneError("launch: name a recipe, or --array SWEEP ('dist-prune list recipes' shows what there is)")
    if arguments.jobs and not arguments.array:
        raise PruneError("--jobs: it limits the tasks of --array SWEEP that run at a time; one recipe is one job")
    if arguments.accelerate:
        _accelerate_file(arguments.accelerate)
    for option in ("engine", "mount"):
        if getattr(arguments, option) and not arguments.container:
            raise PruneError(f"--{option}: it belongs to --container IMAGE; without one a job sees what the node sees")
    if arguments.time and not TIME.fullmatch(arguments.time):
        raise PruneError(f"--time: {shown(arguments.time)} is no time limit; write minutes, HH:MM:SS or D-HH:MM:SS")
    broken = [option for option in arguments.sbatch if not option.isprintable() or not option.strip()]
    if broken:
        raise PruneError(f"--sbatch: {shown(broken[0])} is no single line; each option has an --sbatch of its own")


def _code() -> Path:
    """The folder in which the job's commands start: the checkout, or the present one."""
    root = _template().parents[1]
    return root if (root / "dist_prune").is_dir() else Path.cwd()


def _template() -> Path:
    """The batch script of the package."""
    file = package_folder("slurm") / "run.sbatch"
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

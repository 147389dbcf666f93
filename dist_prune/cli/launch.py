"""``dist-prune launch``: what starts a recipe on several machines: launch configs, batch scripts, manifests."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

from dist_prune.cli import launch_job, launch_kubernetes, launch_skypilot, launch_slurm, launch_torchrun
from dist_prune.cli.launch_job import PORT, configs, find_config
from dist_prune.cli.verb import Answer
from dist_prune.errors import PruneError
from dist_prune.fileio import write_atomic

# form -> what writes it
FORMS: dict[str, Callable[[argparse.Namespace], str]] = {
    "slurm": launch_slurm.batch_script,
    "kubernetes": launch_kubernetes.manifests,
    "skypilot": launch_skypilot.task,
    "torchrun": launch_torchrun.lines,
}
# option -> the forms that have it; all have words, --nodes, --gpus and --processes
OPTIONS = {
    "to": ("config",),
    "array": ("slurm",),
    "jobs": ("slurm",),
    "accelerate": ("slurm",),
    "sbatch": ("slurm",),
    "submit": ("slurm",),
    "time": ("slurm",),
    "account": ("slurm",),
    "qos": ("slurm",),
    "partition": ("slurm",),
    "exclusive": ("slurm",),
    "engine": ("slurm",),
    "cpus": ("slurm", "kubernetes", "skypilot"),
    "mem": ("slurm", "kubernetes", "skypilot"),
    "container": ("slurm", "kubernetes", "skypilot"),
    "mount": ("slurm", "kubernetes", "skypilot"),
    "runs": ("kubernetes", "skypilot", "torchrun"),
    "restarts": ("kubernetes", "skypilot"),
    "kind": ("kubernetes",),
    "gpu_type": ("skypilot",),
    "spot": ("skypilot",),
    "master": ("torchrun",),
    "port": ("torchrun",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's command line."""
    parser.add_argument("words", nargs="*", metavar="RECIPE key=value", help="a recipe (not with --array) and its keys")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument(
        "--config",
        metavar="NAME",
        help=f"print a config file for 'accelerate launch --config_file': {', '.join(configs())}",
    )
    form.add_argument("--slurm", action="store_true", help="write a batch script for SLURM")
    form.add_argument("--kubernetes", action="store_true", help="write manifests for Kubernetes")
    form.add_argument("--skypilot", action="store_true", help="write a task file for SkyPilot's managed jobs")
    form.add_argument("--torchrun", action="store_true", help="print one command for each machine, to start by hand")
    parser.add_argument("--to", metavar="FOLDER", help="with --config: copy the file into this folder")
    size = parser.add_argument_group("size of a run")
    size.add_argument("--nodes", type=int, help="number of nodes (default: 1; with --torchrun 2)")
    size.add_argument(
        "--gpus", type=int, default=1, help="number of GPUs, and of processes, on each node (default: 1; 0: CPUs only)"
    )
    size.add_argument("--processes", type=int, help="number of processes on each node (default: one per GPU)")
    size.add_argument(
        "--cpus", type=int, help="number of CPU cores on each node (default: processes x (1 + data.workers))"
    )
    size.add_argument("--mem", metavar="SIZE", help="memory of each node, for example 64G (default: the cluster's)")
    slurm = parser.add_argument_group("--slurm")
    slurm.add_argument("--array", metavar="SWEEP", help="a sweep file; each of its runs becomes one array task")
    slurm.add_argument("--jobs", type=int, metavar="N", help="with --array: at most N tasks at a time (SLURM's %%N)")
    slurm.add_argument("--time", help="time limit of one start: minutes, HH:MM:SS or D-HH:MM:SS")
    for name in ("account", "qos", "partition"):
        slurm.add_argument(f"--{name}", help=f"the {name} that SLURM takes the job under")
    slurm.add_argument("--exclusive", action="store_true", help="share the nodes with no other job")
    slurm.add_argument("--engine", choices=launch_slurm.ENGINES, help="what starts --container (default: by its name)")
    slurm.add_argument("--accelerate", metavar="FILE", help="config file, or --config's name of one")
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="a further #SBATCH line; may be repeated"
    )
    slurm.add_argument("--submit", action="store_true", help="submit the script by sbatch instead of printing it")
    place = parser.add_argument_group("--slurm, --kubernetes, --skypilot, --torchrun")
    place.add_argument("--container", metavar="IMAGE", help="container image in which dist_prune is installed")
    place.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="FROM[:PATH]",
        help="a further folder of the container (--slurm: a folder of the nodes; --kubernetes: a volume claim; "
        "--skypilot: a bucket or a volume); may be repeated",
    )
    place.add_argument(
        "--runs",
        metavar="PLACE",
        help="where run directories are (--kubernetes: a volume claim; --skypilot: a bucket, a volume or a shared "
        "folder; --torchrun: a shared folder)",
    )
    place.add_argument(
        "--restarts", type=int, metavar="N", help="how often a run that was killed is started again (default: 20)"
    )
    place.add_argument(
        "--kind", choices=launch_kubernetes.KINDS, help="Kubernetes: trainjob (Kubeflow; default), jobset"
    )
    place.add_argument("--gpu-type", metavar="NAME", help="--skypilot: the GPU, for example H100")
    place.add_argument(
        "--spot", action="store_true", help="--skypilot: machines that may be taken away, at their price"
    )
    place.add_argument("--master", metavar="HOST", help="--torchrun: address of the first machine (default: this one)")
    place.add_argument("--port", type=int, help=f"--torchrun: port at which the machines meet (default: {PORT})")


def run(arguments: argparse.Namespace) -> Answer:
    """Print or copy a launch config; or print what a scheduler reads, or submit it.

    Raises:
        PruneError: if the arguments contradict one another, there is no such config, the recipe is wrong, or sbatch is
            missing or refuses.
    """
    form = next(name for name in ("config", *FORMS) if getattr(arguments, name))
    _check_options(arguments, form)
    if form == "config":
        return _config(arguments)
    arguments.nodes = arguments.nodes or (2 if form == "torchrun" else 1)
    text = FORMS[form](arguments).rstrip("\n")
    if arguments.submit:
        return launch_slurm.submit(text)
    return text, {"script": text}, 0


def _check_options(arguments: argparse.Namespace, form: str) -> None:
    """Raise a ``PruneError`` for an option of another form, and for a number that is too small."""
    if form == "config" and (arguments.words or arguments.nodes or arguments.processes):
        raise PruneError("--config prints a file as it is; recipes and sizes go with --slurm and its kin")
    for name, forms in OPTIONS.items():
        if getattr(arguments, name) and form not in forms:
            option = f"--{name.replace('_', '-')}"
            if option == "--to":
                raise PruneError(f"--to: it copies the file of --config; what --{form} writes is printed: ... > FILE")
            what = "prints a file as it is" if form == "config" else "has no such setting"
            raise PruneError(f"{option}: --{form} {what}; it goes with {' or '.join(f'--{one}' for one in forms)}")
    for name in ("nodes", "gpus", "processes", "cpus", "jobs", "restarts", "port"):
        least, value = int(name not in ("gpus", "restarts")), getattr(arguments, name)
        if value is not None and value < least:
            raise PruneError(f"--{name}: {value} is too few; at least {least}")
    launch_job.check_single_words(arguments)


def _config(arguments: argparse.Namespace) -> Answer:
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

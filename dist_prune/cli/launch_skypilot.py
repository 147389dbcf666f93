"""``dist-prune launch --skypilot``: a task file for ``sky jobs launch``, which starts a preempted run again."""

import argparse
import shlex
from typing import Any

import yaml

from dist_prune.cli import launch_job
from dist_prune.cli.launch_job import Job
from dist_prune.distributed.watchdog import EXIT_CODE
from dist_prune.errors import PruneError, shown

RUNS, RECIPES = "/runs", "/recipes"  # folders on the machines
WIDTH = 10**6  # of a line of YAML: values are not broken
ERRORS = 3  # restarts after an error that no rank explained; other restarts are not counted
HEADER = """# A managed job of {name}: dist-prune launch --skypilot
# start: sky jobs launch FILE        what it does: sky jobs queue        end it: sky jobs cancel NAME
# After a preemption SkyPilot starts the same command again on new machines; it resumes from {place}.
"""


def task(arguments: argparse.Namespace) -> str:
    """The task file.

    Args:
        arguments: the verb's parsed command line.

    Raises:
        PruneError: if there is no place for the run directories, a mount is malformed, the kind of GPU is missing, or
            the recipe is wrong.
    """
    if not arguments.runs:
        raise PruneError(
            "--runs: name what keeps the run directories after a machine is gone: a bucket (s3://NAME), a volume of "
            "SkyPilot, or a folder that all machines share (/FOLDER)"
        )
    if arguments.gpus and not arguments.gpu_type:
        raise PruneError("--gpu-type: name the GPU, for example H100 ('sky show-gpus' lists them); --gpus 0: CPUs only")
    job = launch_job.read_job(arguments)
    if job.nodes > 1 and "://" in arguments.runs:
        raise PruneError(
            f"--runs: {arguments.runs}: machines see the files of a bucket some time after they are written, and "
            f"{job.nodes} of them need the same ones at once; name a volume of SkyPilot or a shared folder, or take "
            "--nodes 1"
        )
    body: dict[str, Any] = {"name": job.name, "num_nodes": job.nodes, "resources": _resources(arguments, job)}
    if not arguments.container:
        body["workdir"] = "."
        body["setup"] = "python -m pip install -c constraints.txt -e ."
    files: dict[str, Any] = {}
    volumes: dict[str, str] = {}
    runs = RUNS
    if arguments.runs.startswith("/"):
        runs = arguments.runs.rstrip("/") or "/"
    else:
        _mount(arguments.runs, RUNS, files, volumes, writes=True)
    for mount in arguments.mount:
        source, _, folder = mount.rpartition(":/")
        if not source or not folder:
            raise PruneError(f"--mount: {shown(mount)}: write SOURCE:/FOLDER, a bucket or a volume and its place")
        _mount(source, f"/{folder}", files, volumes, writes=False)
    recipe = None
    if job.file:
        recipe = f"{RECIPES}/{job.file.name}"
        files[recipe] = str(job.file)
    body |= {"file_mounts": files} if files else {}
    body |= {"volumes": volumes} if volumes else {}
    body["run"] = shlex.join(job.command(runs, recipe))
    header = HEADER.format(name=job.recipe.name, place=runs)
    return header + yaml.safe_dump(body, sort_keys=False, width=WIDTH)


def _resources(arguments: argparse.Namespace, job: Job) -> dict[str, Any]:
    restarts = ERRORS if arguments.restarts is None else arguments.restarts
    found: dict[str, Any] = {"cpus": f"{job.cpus}+"}
    if job.memory_gib is not None:
        found["memory"] = f"{max(1, round(job.memory_gib))}+"
    if job.gpus:
        found["accelerators"] = f"{arguments.gpu_type}:{job.gpus}"
    if arguments.spot:
        found["use_spot"] = True
    if arguments.container:
        found["image_id"] = f"docker:{arguments.container.removeprefix('docker:').removeprefix('//')}"
    found["job_recovery"] = {
        "strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": restarts, "recover_on_exit_codes": [EXIT_CODE],
    }  # fmt: skip
    return found


def _mount(source: str, folder: str, files: dict[str, Any], volumes: dict[str, str], writes: bool) -> None:
    """A bucket among the file mounts, anything else among SkyPilot's volumes."""
    if "://" in source:
        # MOUNT cannot append and rename, which a run directory needs
        files[folder] = {"source": source, "mode": "MOUNT_CACHED" if writes else "MOUNT"}
    else:
        volumes[folder] = source

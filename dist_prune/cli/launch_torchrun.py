"""``dist-prune launch --torchrun``: the command that each of several machines starts by hand."""

import argparse
import re
import shlex
import socket
from pathlib import Path

from dist_prune.cli import launch_job
from dist_prune.config import sweep
from dist_prune.errors import PruneError, shown


def lines(arguments: argparse.Namespace) -> str:
    """One line for each machine, the first one's first; they differ in the node's rank alone.

    Args:
        arguments: the verb's parsed command line.

    Raises:
        PruneError: if the recipe or the address is wrong.
    """
    job = launch_job.read_job(arguments)
    master, port = arguments.master or socket.gethostname(), arguments.port or launch_job.PORT
    if not re.fullmatch(r"[A-Za-z0-9.:_-]+", master):
        raise PruneError(f"--master: {shown(master)} is no address; write a host's name or number, for example node1")
    if port > 65535:
        raise PruneError(f"--port: {port} is no port; 1 to 65535")
    default = sweep.choose_run(job.word, None, None, list(job.overrides), need_environment=False)[1]
    place = Path(arguments.runs) / job.recipe.name if arguments.runs else default.resolve()
    threads = [] if job.gpus or job.processes > 1 else [f"OMP_NUM_THREADS={job.cpus}"]
    return "\n".join(
        shlex.join(
            [
                *threads, "python", "-m", "torch.distributed.run", "--nnodes", str(job.nodes), "--node_rank", str(node),
                "--nproc_per_node", str(job.processes), "--master_addr", master, "--master_port", str(port),
                "--max_restarts", "0", "-m", "dist_prune.run", "--recipe", job.word, "--run-dir", str(place),
                *job.overrides,
            ]
        )
        for node in range(job.nodes)
    )  # fmt: skip

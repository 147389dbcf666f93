"""Start the processes of one node under a scheduler, and end with a code that tells it whether to start them again.

    python -m dist_prune.distributed.start_node --processes P [--nodes N] -- --recipe NAME --run-dir DIR key=value

torchrun ends with 1 whatever happened. A scheduler has to tell a run that was asked to stop, and has saved, from an
error that would repeat. The node's rank and the first node's address come from the scheduler's variables (Kubeflow's
PET_*, a JobSet's, SkyPilot's). A request to stop (SIGTERM, SIGUSR1) is passed on to the ranks as SIGUSR1: torchrun
would end them after 30 s, a scheduler may give them longer. This module does not import torch.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import FrameType

from dist_prune.distributed.error_summary import ENDS
from dist_prune.distributed.watchdog import EXIT_CODE
from dist_prune.errors import MISSED, PruneError
from dist_prune.fileio import read_json, read_text

NODES = ("PET_NNODES", "SKYPILOT_NUM_NODES")
NODE_RANK = ("PET_NODE_RANK", "JOB_COMPLETION_INDEX", "SKYPILOT_NODE_RANK", "NODE_RANK")
ADDRESS = ("PET_MASTER_ADDR", "MASTER_ADDR", "SKYPILOT_NODE_IPS")  # SkyPilot: a line for each node
PORT = ("PET_MASTER_PORT", "MASTER_PORT")
JOIN_TIMEOUT = 600  # seconds that the nodes wait for one another
KILLED = 1  # a rank ended and left no word: killed, for example by the kernel for its memory


def main(words: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Start torchrun on this node and wait for it.

    Args:
        words: the command line without the program's name; None: that of this process.
        environment: the environment's variables.

    Returns:
        0 if the run is finished, 75 if it was asked to stop or lost another node: the same command resumes; 2 for an
        error that would repeat, 3 if the target was missed, 1 if a rank was killed.
    """
    try:
        command, run_dir = torchrun(sys.argv[1:] if words is None else words, environment)
    except PruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    asked: list[int] = []
    with tempfile.TemporaryDirectory(prefix="dist_prune-ends-") as ends:
        process: subprocess.Popen[bytes] | None = None

        def stop(number: int, _frame: FrameType | None) -> None:
            asked.append(number)
            if process is not None:
                pass_on(process)

        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, stop)
        # a session of its own: Ctrl-C reaches the ranks once, through this process
        process = subprocess.Popen(command, env={**environment, ENDS: ends}, start_new_session=True)
        if asked:  # between the handler and the start
            pass_on(process)
        process.wait()
        notes = [read_json(file) for file in sorted(Path(ends).glob("*.json"))]
    others = [read_json(file) for file in sorted(run_dir.glob("errors/rank_*.json"))] if run_dir else []
    code = exit_code(process.returncode, notes, others, bool(asked))
    print(f"start_node: torchrun ended with {process.returncode}, this node with {code}", file=sys.stderr, flush=True)
    return code


def torchrun(words: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], Path | None]:
    """The command of torchrun, and the run directory that its words name.

    Args:
        words: the command line without the program's name.
        environment: the environment's variables.

    Raises:
        PruneError: several nodes, and no variable names this one or the first one.
    """
    own, rest = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(prog="start_node", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, help=f"number of nodes (default: {' or '.join(NODES)}, else 1)")
    parser.add_argument("--node-rank", type=int, help=f"number of this node (default: {', '.join(NODE_RANK)})")
    parser.add_argument("--processes", type=int, default=1, help="number of processes on this node")
    parser.add_argument("--address", help=f"address of node 0 (default: {', '.join(ADDRESS)})")
    parser.add_argument("--port", type=int, help=f"port at which the nodes meet (default: {', '.join(PORT)}, 29500)")
    options = parser.parse_args(list(own))
    nodes = options.nodes or int(_first(environment, NODES) or 1)
    rank = options.node_rank if options.node_rank is not None else _first(environment, NODE_RANK)
    address = options.address or _first(environment, ADDRESS).splitlines()[:1]
    if nodes > 1 and (rank == "" or not address):
        missing = "rank (--node-rank" if rank == "" else "first node's address (--address"
        names = NODE_RANK if rank == "" else ADDRESS
        raise PruneError(f"{nodes} nodes, but this node's {missing}; or one of {', '.join(names)}) is not known")
    address = address if isinstance(address, str) else address[0] if address and nodes > 1 else "127.0.0.1"
    port = options.port or int(_first(environment, PORT) or 29500)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--node_rank", str(rank or 0),
        "--nproc_per_node", str(options.processes), "--master_addr", address, "--master_port", str(port),
        "--rdzv_conf", f"timeout={JOIN_TIMEOUT}", "--max_restarts", "0", "-m", "dist_prune.run", *rest,
    ]  # fmt: skip
    place = next((rest[i + 1] for i, word in enumerate(rest[:-1]) if word == "--run-dir"), None)
    return command, Path(place) if place else None


def exit_code(
    launcher: int, own: Collection[Mapping[str, object]], others: Collection[Mapping[str, object]], asked: bool
) -> int:
    """What a scheduler needs to know.

    Args:
        launcher: torchrun's exit code.
        own: notes of this node's ranks: ``code``, and ``cause`` (False: it stopped because another rank did).
        others: notes of ranks in the run directory, which those that lost another one do not write: ``code``.
        asked: whether this node was asked to stop.

    Returns:
        See ``main``.
    """
    if launcher == 0:
        return 0
    causes = {note.get("code") for note in own if note.get("cause")}
    for code in (EXIT_CODE, PruneError.code, MISSED):
        if code in causes:
            return code
    if causes:
        return KILLED
    if asked:
        return EXIT_CODE
    if own:  # another node's rank ended first: its error, if it left one
        codes = {note.get("code") for note in others}
        return next((code for code in (PruneError.code, KILLED) if code in codes), EXIT_CODE)
    return KILLED


def pass_on(launcher: "subprocess.Popen[bytes]") -> None:
    """Ask the ranks to save and to stop; a launcher that has none yet, or does not show them, is ended itself."""
    ranks = [
        int(pid) for file in Path(f"/proc/{launcher.pid}/task").glob("*/children") for pid in read_text(file).split()
    ]
    if not ranks:
        launcher.terminate()
    for pid in ranks:
        try:
            os.kill(pid, signal.SIGUSR1)
        except ProcessLookupError:
            continue


def _first(environment: Mapping[str, str], names: Sequence[str]) -> str:
    return next((environment[name] for name in names if environment.get(name)), "")


if __name__ == "__main__":
    sys.exit(main())

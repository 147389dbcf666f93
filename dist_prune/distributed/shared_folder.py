"""Whether all ranks of a run see the same run directory."""

import contextlib
import secrets
import socket
import time
from pathlib import Path

from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError, abbreviate
from dist_prune.fileio import write_atomic

PATIENCE_S = 20.0  # seconds until a network file system shows a new file on all nodes
TOKEN = ".seen"


def check_shared_folder(folder: Path, comm: Communicator, patience_s: float = PATIENCE_S) -> None:
    """Check that the run directory is one folder for all ranks: rank 0 writes a token there and every rank reads it.

    A collective: every rank calls it.

    Args:
        folder: the run directory.
        comm: all processes of the run.
        patience_s: seconds for which a rank waits until it sees the token.

    Raises:
        PruneError: on every rank, with the names of the ranks that do not see the token.
    """
    if comm.world == 1:
        return
    token = comm.broadcast_object(secrets.token_hex(16)) or ""
    file = folder / TOKEN
    comm.run_on_main(lambda: write_atomic(file, token))
    seen = _can_read(file, token, patience_s)
    where = f"rank {comm.rank} on {socket.gethostname()}"
    blind = [name for name in comm.all_gather_object("" if seen else where) if name]
    comm.run_on_main(lambda: file.unlink(missing_ok=True))
    if blind:
        raise PruneError(
            f"--run-dir: {folder.absolute()} is not the same folder for all: {abbreviate(blind)} cannot see what rank "
            "0 writes there. All ranks read stages' files from it: name one on a file system that all nodes share"
        )


def _can_read(file: Path, token: str, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(OSError, ValueError):
            if file.read_text() == token:
                return True
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(OSError):  # a listing makes NFS ask its server again
            next(file.parent.iterdir(), None)
        time.sleep(0.2)

"""The location of the run directory, and the removal of unfinished files in it. Imports no torch."""

import contextlib
import os
import re
from pathlib import Path

from dist_prune.errors import PruneError, path_trouble

LEFTOVER = re.compile(r"\..+\.\d+\.tmp")  # the temporary names of fileio.write_atomic


def run_directory(option: str | None, default: str | Path) -> Path:
    """The folder that ``--run-dir`` names, or the recipe's own.

    Args:
        option: The value of ``--run-dir``; None if it was left out.
        default: The recipe's own folder.

    Raises:
        PruneError: ``--run-dir`` is empty, as an unset variable leaves it, or no path at all.
    """
    if option is not None and not option.strip():
        raise PruneError("--run-dir: it is empty; name a folder, or leave the option out (an unset variable in it?)")
    path = str(option if option is not None else default)
    if trouble := path_trouble(path):
        raise PruneError(f"--run-dir: {trouble}")
    return Path(path)


def clear_leftovers(folder: Path) -> int:
    """Remove the files that a killed process had not finished. Links are not followed.

    The first rank of a run calls it while it holds the folder's lock, so that no other process writes there.

    Args:
        folder: The run directory.

    Returns:
        The number of files removed.
    """
    removed = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if LEFTOVER.fullmatch(name):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(parent, name))
                    removed += 1
    return removed

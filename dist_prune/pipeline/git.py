"""The git commit of the code that runs."""

import subprocess
from pathlib import Path


def commit_of(file: Path) -> str | None:
    """The commit of the working copy that contains a file, with ``-dirty`` if tracked files differ from it.

    Args:
        file: Any file of the working copy.

    Returns:
        40 hexadecimal digits, perhaps with ``-dirty``; None outside of a git working copy or without git.
    """
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        result = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None

"""Which code ran: the commit of the working copy that a file belongs to."""

import subprocess
from pathlib import Path


def commit_of(file: Path) -> str | None:
    """The commit, with ``-dirty`` where files differ from it; None outside a git working copy."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        result = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None

"""The error that stopped a run, repeated below the launcher's own traceback.

``accelerate launch`` and torchrun print a traceback of their own when a process exits with a code. That traceback says
nothing about the cause and comes after our error. A process cannot keep its launcher from printing it. So the first
process that stops starts a small writer in a session of its own, because launchers end the whole session of a process.
The writer waits until the launcher has ended and then writes to the same stderr. The exit code stays the launcher's.

If that is impossible (no /proc, no folder for temporary files) nothing is lost: the error was printed before.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun", "deepspeed")
MODULES = ("accelerate.", "torch.distributed.", "deepspeed.")
GENERATIONS = 6  # of ancestors that are searched: DeepSpeed's launcher runs between accelerate and the process
ENDS = "DIST_PRUNE_ENDS"  # variable: folder for a note of each rank that stops, which start_node reads
PATIENCE_S = 120  # seconds; an elastic launcher that is alive after them has started the processes again


def record(text: str, rank: int, cause: bool = True, code: int = 1) -> None:
    """Have ``text`` written after the launcher's last line; without a launcher nothing is written.

    Each rank that stops calls it. The texts of several ranks are merged (see ``merge_notes``).

    Args:
        text: the error that the user should read last.
        rank: of this process.
        cause: False if this process stopped because another one did; such a text is written only if no rank recorded
            a cause.
        code: exit code of this process, for ``start_node``: the launcher's own is 1.
    """
    note = {"text": text, "rank": rank, "cause": cause, "at": time.time()}
    if ends := os.environ.get(ENDS):
        with contextlib.suppress(OSError):
            Path(ends, f"{rank}.json").write_text(json.dumps({**note, "code": code}))
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        launcher = launcher_of(os.getppid())
        if launcher is None:
            return
        folder = _folder(launcher)
        first = _make_folder(folder)
        hidden = folder / f".{rank}"
        hidden.write_text(json.dumps(note))
        hidden.replace(folder / f"{rank}.json")
        if first:
            subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(launcher), str(folder)], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip


def clear() -> None:
    """Drop the recorded texts after an elastic launcher has started the processes again."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return
    with contextlib.suppress(OSError, ValueError):
        launcher = launcher_of(os.getppid())
        if launcher is not None:
            for file in _folder(launcher).glob("*.json"):
                file.unlink(missing_ok=True)


def launcher_of(pid: int) -> int | None:
    """The process id of the outermost launcher among process ``pid`` and its ancestors, or None without a launcher.

    That launcher is the one that prints last.
    """
    launcher = None
    for _ in range(GENERATIONS):
        if pid <= 1:
            break
        if _is_launcher(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")):
            launcher = pid
        pid = int(_stat(pid)[1])
    return launcher


def _is_launcher(words: list[str]) -> bool:
    """Whether a command line runs a launcher, by its own name or by a Python interpreter."""
    name = Path(words[0]).name
    if name in LAUNCHERS:
        return True
    if not name.startswith(("python", "pypy")):
        return False
    remaining = iter(words[1:])
    for word in remaining:
        if word == "-m":
            return f"{next(remaining, '')}.".startswith(MODULES)
        if word in ("-W", "-X"):
            next(remaining, None)
        elif not word.startswith("-"):
            return Path(word).name in LAUNCHERS
    return False


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name, which may hold any characters: state, parent, ..., start time (19)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _folder(launcher: int) -> Path:
    """The folder of a launcher's texts; its name has the start time because process ids are used again."""
    return Path(tempfile.gettempdir()) / f"dist_prune-{os.getuid()}-{launcher}-{_stat(launcher)[19]}"


def _make_folder(folder: Path) -> bool:
    """Make the folder; True if this process was the first, which then starts the writer."""
    try:
        folder.mkdir(mode=0o700)
        return True
    except FileExistsError:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise OSError(f"{folder} belongs to another user") from None
        return False


def merge_notes(notes: list[Mapping[str, Any]]) -> str:
    """Merge the notes of several ranks into one text.

    Args:
        notes: mappings with ``text``, ``rank``, ``cause`` and ``at`` (seconds), as ``record`` writes them.

    Returns:
        The causes if there are any, else all texts; in the order of time, each text once, with the rank before it if
        there are several.
    """
    chosen = [note for note in notes if note["cause"]] or notes
    texts: dict[str, int] = {}
    for note in sorted(chosen, key=lambda note: note["at"]):
        texts.setdefault(note["text"], note["rank"])
    if len(texts) == 1:
        return next(iter(texts))
    return "\n".join(f"[rank {rank}] {text}" for text, rank in texts.items())


def _wait(pid: int, seconds: float) -> bool:
    """Wait for the end of a process; whether it ended in time."""
    deadline = time.monotonic() + seconds
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except (AttributeError, OSError):  # an old kernel, or a container that forbids it
        while Path(f"/proc/{pid}").exists() and _stat(pid)[0] != "Z":
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True
    return bool(select.select([handle], [], [], seconds)[0])


def _write(launcher: int, folder: Path) -> None:
    try:
        if _wait(launcher, PATIENCE_S):
            notes = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
            if notes:
                sys.stderr.write(f"\nThe lines above are the launcher's. {merge_notes(notes)}\n")
                sys.stderr.flush()
    finally:
        for file in [*folder.glob("*.json"), *folder.glob(".*")]:
            file.unlink(missing_ok=True)
        folder.rmdir()


if __name__ == "__main__":
    with contextlib.suppress(OSError, ValueError):
        _write(int(sys.argv[1]), Path(sys.argv[2]))

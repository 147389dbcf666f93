"""What stopped a run, said once more below the launcher's own traceback.

``accelerate launch`` and torchrun answer a process that leaves with a code by a traceback of their own, which has
nothing to say and comes after ours. A process cannot keep its launcher from printing it. So the first that stops leaves
a small writer behind, in a session of its own (launchers end the whole session of a process): it waits until the
launcher is gone and then writes to the same stderr. Exit codes are the launcher's, as before.

Where that cannot be done (no /proc, no folder for temporary files) nothing is lost: the text was said before.
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
GENERATIONS = 6  # DeepSpeed's launcher stands between accelerate and the process
PATIENCE_S = 120  # an elastic launcher that is still there after that has started the processes again


def record(text: str, rank: int, cause: bool = True) -> None:
    """Have ``text`` written behind the launcher's last line; without a launcher nothing happens.

    Args:
        text: what the person should read last.
        rank: of this process; texts of several are put together, each once.
        cause: False where another process's end is the reason; said only if none says the cause.
    """
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        launcher = launcher_of(os.getppid())
        if launcher is None:
            return
        folder = _folder(launcher)
        first = _made(folder)
        note = {"text": text, "rank": rank, "cause": cause, "at": time.time()}
        hidden = folder / f".{rank}"
        hidden.write_text(json.dumps(note))
        hidden.replace(folder / f"{rank}.json")
        if first:
            subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(launcher), str(folder)], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip


def clear() -> None:
    """An elastic launcher has started the processes again: what stopped the last ones is not the last word."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return
    with contextlib.suppress(OSError, ValueError):
        launcher = launcher_of(os.getppid())
        if launcher is not None:
            for file in _folder(launcher).glob("*.json"):
                file.unlink(missing_ok=True)


def launcher_of(pid: int) -> int | None:
    """The process that prints last: the eldest launcher among ``pid`` and its ancestors, or None."""
    found = None
    for _ in range(GENERATIONS):
        if pid <= 1:
            break
        if _launches(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")):
            found = pid
        pid = int(_stat(pid)[1])
    return found


def _launches(words: list[str]) -> bool:
    """Whether a command line is a launcher's: its own name, or an interpreter that runs it."""
    name = Path(words[0]).name
    if name in LAUNCHERS:
        return True
    if not name.startswith(("python", "pypy")):
        return False
    rest = iter(words[1:])
    for word in rest:
        if word == "-m":
            return f"{next(rest, '')}.".startswith(MODULES)
        if word in ("-W", "-X"):
            next(rest, None)
        elif not word.startswith("-"):
            return Path(word).name in LAUNCHERS
    return False


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat behind the name, which may hold anything: state, parent, ..., start time (19)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _folder(launcher: int) -> Path:
    """Where the processes of a launcher leave their texts; the start time tells a number's next owner apart."""
    return Path(tempfile.gettempdir()) / f"dist_prune-{os.getuid()}-{launcher}-{_stat(launcher)[19]}"


def _made(folder: Path) -> bool:
    """Whether this process made the folder, and so is the one that leaves the writer."""
    try:
        folder.mkdir(mode=0o700)
        return True
    except FileExistsError:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise OSError(f"{folder} is another user's") from None
        return False


def merge_notes(notes: list[Mapping[str, Any]]) -> str:
    """One text of many processes' notes: causes before consequences, the first first, the same text once."""
    chosen = [note for note in notes if note["cause"]] or notes
    texts: dict[str, int] = {}
    for note in sorted(chosen, key=lambda note: note["at"]):
        texts.setdefault(note["text"], note["rank"])
    if len(texts) == 1:
        return next(iter(texts))
    return "\n".join(f"[rank {rank}] {text}" for text, rank in texts.items())


def _wait(pid: int, seconds: float) -> bool:
    """Whether the process ended within that time."""
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

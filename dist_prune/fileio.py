"""Files that survive a crash: atomic writes, appended lines with digests, tolerant reads, canonical JSON."""

import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from dist_prune.errors import PruneError


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(data: bytes | str) -> str:
    """The sha256 of bytes, or of a text in UTF-8, in hex."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file's content in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_cache() -> Path:
    """This package's folder in the user's cache, $XDG_CACHE_HOME or ~/.cache; it need not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_prune"


def read_text(path: Path) -> str:
    """Read a text file that this package has written.

    Bytes that are not UTF-8 become replacement characters. A FIFO or a device is not opened.

    Returns:
        The text; empty if the file is missing, unreadable, or not a regular file (a folder, a link to itself).
    """
    try:
        return path.read_text(errors="replace") if path.is_file() else ""
    except OSError:
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file that this package has written; {} if it is missing or damaged in any way."""
    try:
        body = json.loads(read_text(path))
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it, so that a crash leaves the old one.

    Args:
        path: the file; missing folders are made.
        data: its content; a text is written as UTF-8.

    Raises:
        PruneError: if the disk refuses (full, read-only, quota); the old file is untouched.
    """
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_new(temporary) as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # os.path: a folder that may not be entered is no error here
        state = "the file from before is intact" if os.path.exists(path) else "nothing was left behind"
        raise PruneError(
            f"could not write {path} ({len(raw):,} bytes): {error.strerror or error}; {state}. "
            "Free space or name another --run-dir, then run the same command again: finished stages are skipped."
        ) from error


def folder_trouble(folder: Path) -> str:
    """Say why files cannot be written in a folder; it is not made.

    Args:
        folder: a folder that is there, or that would be made with those above it.

    Returns:
        A clause for an error, or an empty text if a file could be written.
    """
    place = folder = folder.expanduser().absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{folder} cannot be made: {place} is no folder"
    try:
        os.rmdir(tempfile.mkdtemp(dir=place, prefix=".dist_prune-"))
    except OSError as error:
        what = "written to" if place == folder else f"made in {place}"
        return f"{folder} cannot be {what}: {error.strerror or error}"
    return ""


def open_new(path: Path) -> IO[bytes]:
    """Create a file for writing and replace whatever has its name; a link is removed, not followed.

    Raises:
        FileExistsError: if another process makes the name again and again.
    """
    for _ in range(3):
        with contextlib.suppress(FileExistsError):
            return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o666), "wb")
        path.unlink(missing_ok=True)
    raise FileExistsError(errno.EEXIST, "something else makes it again and again", str(path))


def open_plain(path: Path, flags: int) -> IO[bytes]:
    """Open a regular file unbuffered, to read and write, and create it if it is missing.

    Args:
        path: the file.
        flags: an access mode of ``os.open`` and its further flags, for example ``os.O_RDWR | os.O_APPEND``.

    Raises:
        OSError: for a link, a FIFO, a device or a folder.
    """
    try:
        handle = os.open(path, os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, f"{path.name} is a symbolic link, which is not followed") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, f"{path.name} is no regular file")
    return os.fdopen(handle, "a+b" if flags & os.O_APPEND else "r+b", buffering=0)


def open_append(path: Path) -> IO[bytes]:
    """Open a regular file unbuffered, to read and append (see ``open_plain``)."""
    return open_plain(path, os.O_RDWR | os.O_APPEND)


def seal(line: Mapping[str, Any]) -> str:
    """A mapping as a line of canonical JSON that holds its own digest under ``sum``."""
    return canonical({**line, "sum": digest(canonical(dict(line)))[:16]})


def unseal(text: str) -> dict[str, Any] | None:
    """The mapping of a line of ``seal`` or of a line without a digest; None if it was cut off or altered."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    expected = line.pop("sum", None)
    return line if expected is None or expected == digest(canonical(line))[:16] else None


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append whole lines and flush them to the disk.

    A line that a crash cut off earlier stays as a line of its own.

    Args:
        path: the file; created if it is missing.
        lines: texts without line ends.

    Raises:
        PruneError: if the disk refuses; then the file is as before.
    """
    text = "".join(line + "\n" for line in lines)
    try:
        with open_append(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size:
                file.seek(size - 1)
                text = text if file.read(1) == b"\n" else "\n" + text
            try:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), size)
                raise
    except OSError as error:
        raise PruneError(f"could not append to {path}: {error.strerror or error}") from error

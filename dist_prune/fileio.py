"""Files that survive a crash: atomic writes, appended lines with a digest, tolerant reads, JSON with one spelling."""

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from dist_prune.errors import PruneError


def canonical(value: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(data: bytes | str) -> str:
    """sha256 in hex."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's content in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path) -> str:
    """The text of a file of ours; "" where it is missing, unreadable, or something else (a folder, a link to itself).

    Bytes that are no UTF-8 become marks that nothing of ours is equal to. A FIFO or a device is not opened.
    """
    try:
        return path.read_text(errors="replace") if path.is_file() else ""
    except OSError:
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file of ours; {} where it is missing or damaged in any way."""
    try:
        body = json.loads(read_text(path))
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write under a temporary name, flush to the disk, rename: the old file stays whole until the new one is.

    Raises:
        PruneError: when the disk refuses (full, read-only, quota); the old file is untouched.
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
        kept = "the file from before is intact" if path.exists() else "nothing was left behind"
        raise PruneError(
            f"could not write {path} ({len(raw):,} bytes): {error.strerror or error}; {kept}. "
            "Free space or name another --run-dir, then run the same command again: finished stages are skipped."
        ) from error


def open_new(path: Path) -> IO[bytes]:
    """A file for writing that is made here, whatever lay there before: a planted link is removed, not followed."""
    for _ in range(3):
        with contextlib.suppress(FileExistsError):
            return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o666), "wb")
        path.unlink(missing_ok=True)
    raise FileExistsError(errno.EEXIST, "something else makes it again and again", str(path))


def open_plain(path: Path, flags: int) -> IO[bytes]:
    """A regular file, made where it is missing, unbuffered; OSError for a link, a FIFO, a device, a folder."""
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
    """``open_plain`` to read and to append to."""
    return open_plain(path, os.O_RDWR | os.O_APPEND)


def seal(line: Mapping[str, Any]) -> str:
    """A line of JSON with its own digest in it."""
    return canonical({**line, "sum": digest(canonical(dict(line)))[:16]})


def unseal(text: str) -> dict[str, Any] | None:
    """What ``sealed`` was given, or a line without a digest; None where it is no mapping, cut off or altered."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    found = line.pop("sum", None)
    return line if found is None or found == digest(canonical(line))[:16] else None


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append whole lines and see them to the disk; a line that a crash cut off before is left behind on its own."""
    text, size = "".join(line + "\n" for line in lines), -1
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

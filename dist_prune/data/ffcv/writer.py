"""Write a data set as an FFCV file (.beton) with a sidecar that says what it holds.

FFCV's field encoders and file layout, with another writer around them: FFCV's own waits for ever when one of its
workers dies, leaves a file that looks whole when it is killed, and orders the images by chance. Here the file is the
same for any number of workers, and a killed writing goes on where it was.

On the way there are ``FILE.part`` (the bytes), ``FILE.part.rows`` (one row per image whose bytes are safely in it) and
``FILE.part.json`` (what is being written). ``FILE`` appears under its name when all of it and its sidecar, as
``FILE.tmp``, are on the disk; the sidecar gets its name ``FILE.json`` after that; without it nobody reads ``FILE``.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from dist_prune.data.ffcv.backend import FORMAT, digest, read_sidecar, sidecar_of
from dist_prune.data.ffcv.encoder import ROW, Settings, encoded, estimate
from dist_prune.data.ffcv.loader import Layout
from dist_prune.data.random_access import RandomAccessSource
from dist_prune.errors import PruneError
from dist_prune.fileio import open_append, open_plain, read_json, write_atomic

SETTLE_BYTES, SETTLE_S = 64 << 20, 1.0  # how often what was written is made safe


def write_beton(
    source: RandomAccessSource,
    origin: dict[str, Any],
    out: Path,
    settings: Settings,
    workers: int,
    say: Callable[[str], None],
    bar: Callable[[int, int], Any],
) -> dict[str, Any]:
    """Write ``source`` to ``out`` and its sidecar; a writing that was stopped goes on.

    Args:
        origin: what to call the source in the sidecar (kind, root, split).
        workers: encoding processes.
        say: takes lines for the user.
        bar: makes a progress bar from (number of images done, of all); it has ``update(n)`` and ``close()``.

    Returns:
        The sidecar's content.

    Raises:
        PruneError: images that cannot be read, a full disk, another writer at work, a file that is not this command's.
    """
    size = source.fixed_size
    if size is not None and size[0] != size[1]:
        raise PruneError(f"arrays of {size[0]} x {size[1]} are not square: use data.backend={source.backends[0]}")
    plan = {
        "format": FORMAT, "source": origin, "source_digest": source.identity, "count": len(source.labels),
        "classes": list(source.classes), "in_chans": source.in_chans, "arrays": size is not None,
        **asdict(settings),
    }  # fmt: skip
    if (done := _finished(out, plan, say)) is not None:
        return done
    part = out.with_name(out.name + ".part")
    with _alone(part, out) as file:
        try:
            rows = _resume(part, file, plan, say)
            about = estimate(source, settings)
            room, have = shutil.disk_usage(part.parent).free, part.stat().st_size
            say(f"{len(source.labels):,} images, about {about / 2**20:,.0f} MiB; {room / 2**20:,.0f} MiB are free")
            if about - have > room:
                raise PruneError(
                    f"--out: {out} needs about {about / 2**20:,.0f} MiB, {room / 2**20:,.0f} MiB are free there"
                )
            progress = bar(len(rows), len(source.labels))
            try:
                rows = _append(source, settings, part, file, rows, workers, progress.update)
            finally:
                progress.close()
            return _finish(part, file, out, rows, source.labels, settings, plan)
        except OSError as error:
            raise PruneError(
                f"--out: {part} cannot be written: {error}; mend it and run the same command again"
            ) from error


def _finished(out: Path, plan: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
    """The sidecar of a whole file that holds exactly this; None where there is work to do."""
    if not out.exists():
        return None
    if not sidecar_of(out).exists():
        part = out.with_name(out.name + ".part")
        if _stopped_last(out, plan):
            say(f"{out} was written before, all but its sidecar")
            _settle(part, out)
        elif part.exists() and not _changed(read_json(_plan_of(part)), plan):
            return None  # stopped before it could take the place of an older file
        else:
            raise PruneError(
                f"--out: {out} exists and has no sidecar {sidecar_of(out).name}: remove it or choose another name"
            )
    try:
        facts = read_sidecar(out)
    except PruneError as error:
        say(f"written anew: {error}")
        return None
    if changed := _changed(facts, plan):
        say(f"written anew: {out} was made with another {', '.join(changed)}")
    elif digest(out) != facts["sha256"]:
        say(f"written anew: the digest of {out} is not its sidecar's")
    else:
        say(f"{out} is whole already (digest checked)")
        return facts
    return None


def _stopped_last(out: Path, plan: dict[str, Any]) -> bool:
    """Whether a writing of exactly this was stopped when the file had its name and the sidecar had not."""
    facts = read_json(_ready_of(out))
    return not _changed(facts, plan) and digest(out) == facts.get("sha256")


def _changed(facts: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    """What is planned otherwise than it was; where the source lies does not matter, its digest does."""
    return [key for key in plan if facts.get(key) != plan[key] and key != "source"]


@contextmanager
def _alone(part: Path, out: Path) -> Iterator[IO[bytes]]:
    """The file being written, open, held by one writer at a time."""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        file = open_plain(part, os.O_RDWR)
    except OSError as error:
        raise PruneError(f"--out: {part} cannot be opened: {error}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: its workers do not hold it
        except OSError as error:
            raise PruneError(f"--out: another process is writing {out}") from error
        yield file


def _rows_of(part: Path) -> Path:
    return part.with_name(part.name + ".rows")


def _plan_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _ready_of(out: Path) -> Path:
    return sidecar_of(out).with_suffix(".tmp")


def _resume(part: Path, file: IO[bytes], plan: dict[str, Any], say: Callable[[str], None]) -> np.ndarray:
    """Rows of the images whose bytes are in the file from an earlier attempt at the same; the rest is cut off."""
    same = not _changed(read_json(_plan_of(part)), plan)
    rows = np.zeros(0, ROW)
    if same and _rows_of(part).is_file():
        data = _rows_of(part).read_bytes()
        rows = np.frombuffer(data[: len(data) // ROW.itemsize * ROW.itemsize], ROW)
        ends = rows["place"] + rows["size"]
        rows = rows[: int((ends <= part.stat().st_size).cumprod().sum())]  # a power cut may keep rows without bytes
        say(f"goes on after {len(rows):,} images that were written before")
    write_atomic(_rows_of(part), rows.tobytes())
    write_atomic(_plan_of(part), json.dumps(plan))
    file.truncate(int(rows[-1]["place"] + rows[-1]["size"]) if len(rows) else 0)
    return rows


def _append(
    source: RandomAccessSource, settings: Settings, part: Path, file: IO[bytes], rows: np.ndarray,
    workers: int, done: Callable[[int], Any],
) -> np.ndarray:  # fmt: skip
    """Encode the images that are missing and write them behind the others; rows of all images."""
    found, pending, since = [rows], [], time.monotonic()
    start = Layout.data_start(len(source.labels), settings.page)
    end, unsafe = int(rows[-1]["place"] + rows[-1]["size"]) if len(rows) else start, 0
    with open_append(_rows_of(part)) as journal:

        def settle() -> None:
            os.fsync(file.fileno())
            for block in pending:
                journal.write(block.tobytes())
            journal.flush()
            pending.clear()

        for chunk in encoded(source, settings, len(rows), workers):
            block, at = chunk.rows.copy(), 0
            for row in block:
                size = int(row["size"])
                if size > settings.page - end % settings.page:
                    end += settings.page - end % settings.page
                row["place"] = end
                _write(file, end, chunk.payload[at : at + size])
                end, at = end + size, at + size
            found.append(block)
            pending.append(block)
            unsafe += at
            done(len(block))
            if unsafe > SETTLE_BYTES or time.monotonic() - since > SETTLE_S:
                settle()
                unsafe, since = 0, time.monotonic()
        settle()
    return np.concatenate(found)


def _write(file: IO[bytes], place: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file.fileno(), view, place)
        view, place = view[count:], place + count


def _finish(
    part: Path,
    file: IO[bytes],
    out: Path,
    rows: np.ndarray,
    labels: np.ndarray,
    settings: Settings,
    plan: dict[str, Any],
) -> dict[str, Any]:
    """Write header, metadata and allocation table, put the file in its place, and its sidecar after it."""
    head, tail, end = Layout.ends(rows, labels, settings.page)
    _write(file, 0, head)
    file.truncate(end)
    _write(file, end, tail)
    os.fsync(file.fileno())
    index = [[0, len(head)], [end, end + len(tail)]]
    modes = {name: int((rows["mode"] == code).sum()) for name, code in Layout.MODES.items()}
    facts = plan | {
        "ffcv": Layout.VERSION, "bytes": end + len(tail), "stored": modes, "index": index,
        "sha256": digest(part), "index_sha256": digest(part, *index),
    }  # fmt: skip
    write_atomic(_ready_of(out), json.dumps(facts, indent=1) + "\n")
    sidecar_of(out).unlink(missing_ok=True)
    os.replace(part, out)
    _settle(part, out)
    return facts


def _settle(part: Path, out: Path) -> None:
    """The last step: the sidecar, which is ready, gets its name, and what was kept to go on is no longer needed."""
    os.replace(_ready_of(out), sidecar_of(out))
    for left in (_rows_of(part), _plan_of(part)):
        left.unlink(missing_ok=True)

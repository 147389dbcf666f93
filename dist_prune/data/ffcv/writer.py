"""Writer of data sets as FFCV files (.beton), each with a sidecar that describes its content.

It uses FFCV's field encoders and file layout. FFCV's own writer waits forever when one of its workers dies, leaves a
file that looks complete when it is killed, and orders the images by chance. Here the file is the same for any number of
workers, and a killed command resumes.

While it runs there are ``FILE.part`` (the bytes), ``FILE.part.rows`` (one row per image whose bytes are safely on the
disk) and ``FILE.part.json`` (the command). ``FILE`` gets its name when all of it is on the disk, with its sidecar as
``FILE.tmp``. After that the sidecar gets its name ``FILE.json``; without it nothing reads ``FILE``.
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

from dist_prune.data.ffcv.backend import FORMAT, digest, read_sidecar, sidecar_path
from dist_prune.data.ffcv.encoder import ROW_DTYPE, Settings, encode_chunks, estimate_bytes
from dist_prune.data.ffcv.loader import BetonLayout
from dist_prune.data.random_access import RandomAccessSource
from dist_prune.errors import PruneError
from dist_prune.fileio import open_append, open_plain, read_json, write_atomic

SYNC_BYTES, SYNC_S = 64 << 20, 1.0  # written bytes are flushed to the disk after so many bytes or seconds


def write_beton(
    source: RandomAccessSource,
    origin: dict[str, Any],
    out: Path,
    settings: Settings,
    workers: int,
    say: Callable[[str], None],
    bar: Callable[[int, int], Any],
) -> dict[str, Any]:
    """Write a data set as a .beton with its sidecar; resume if an earlier attempt was stopped.

    Args:
        source: the opened split; arrays must be square.
        origin: names the source in the sidecar (kind, root, split).
        out: path of the .beton.
        settings: how images are stored.
        workers: number of encoding processes.
        say: takes lines for the user.
        bar: makes a progress bar from (number of images done, of all); it has ``update(n)`` and ``close()``.

    Returns:
        Content of the sidecar.

    Raises:
        PruneError: images that cannot be read or are not square, a full disk, another process that writes the same
            file, or an existing file that this command did not write.
    """
    fixed_size = source.fixed_size
    if fixed_size is not None and fixed_size[0] != fixed_size[1]:
        raise PruneError(
            f"arrays of {fixed_size[0]} x {fixed_size[1]} are not square: use data.backend={source.backends[0]}"
        )
    plan = {
        "format": FORMAT,
        "source": origin,
        "source_digest": source.identity,
        "count": len(source.labels),
        "classes": list(source.classes),
        "in_chans": source.in_chans,
        "arrays": fixed_size is not None,
        **asdict(settings),
    }
    if (finished := _read_finished(out, plan, say)) is not None:
        return finished
    partial = out.with_name(out.name + ".part")
    with _open_exclusively(partial, out) as file:
        try:
            rows = _resume(partial, file, plan, say)
            expected = estimate_bytes(source, settings)
            free, written = shutil.disk_usage(partial.parent).free, partial.stat().st_size
            say(f"{len(source.labels):,} images, about {expected / 2**20:,.0f} MiB; {free / 2**20:,.0f} MiB are free")
            if expected - written > free:
                raise PruneError(
                    f"--out: {out} needs about {expected / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free there"
                )
            progress = bar(len(rows), len(source.labels))
            try:
                rows = _append(source, settings, partial, file, rows, workers, progress.update)
            finally:
                progress.close()
            return _finish(partial, file, out, rows, source.labels, settings, plan)
        except OSError as error:
            raise PruneError(
                f"--out: {partial} cannot be written: {error}; correct this and run the same command again"
            ) from error


def _read_finished(out: Path, plan: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
    """The sidecar of a complete file with exactly this content; None if there is work to do."""
    if not out.exists():
        return None
    if not sidecar_path(out).exists():
        partial = out.with_name(out.name + ".part")
        if _lacks_only_sidecar(out, plan):
            say(f"{out} was complete, all but its sidecar")
            _publish_sidecar(partial, out)
        elif partial.exists() and not _changed_keys(read_json(_plan_path(partial)), plan):
            return None  # stopped before it replaced an older file
        else:
            raise PruneError(
                f"--out: {out} exists and has no sidecar {sidecar_path(out).name}: remove it or choose another name"
            )
    try:
        facts = read_sidecar(out)
    except PruneError as error:
        say(f"written anew: {error}")
        return None
    if changed := _changed_keys(facts, plan):
        say(f"written anew: {out} was made with another {', '.join(changed)}")
    elif digest(out) != facts["sha256"]:
        say(f"written anew: the digest of {out} is not its sidecar's")
    else:
        say(f"{out} is complete already (digest checked)")
        return facts
    return None


def _lacks_only_sidecar(out: Path, plan: dict[str, Any]) -> bool:
    """Whether this command was stopped after the file got its name and before the sidecar got its own."""
    facts = read_json(_pending_sidecar(out))
    return not _changed_keys(facts, plan) and digest(out) == facts.get("sha256")


def _changed_keys(facts: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    """Keys of the plan that differ. The location of the source does not matter, its digest does."""
    return [key for key in plan if facts.get(key) != plan[key] and key != "source"]


@contextmanager
def _open_exclusively(partial: Path, out: Path) -> Iterator[IO[bytes]]:
    """Open the file to be written, locked for one process."""
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        file = open_plain(partial, os.O_RDWR)
    except OSError as error:
        raise PruneError(f"--out: {partial} cannot be opened: {error}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by this process, not by its workers
        except OSError as error:
            raise PruneError(f"--out: another process is writing {out}") from error
        yield file


def _rows_path(partial: Path) -> Path:
    return partial.with_name(partial.name + ".rows")


def _plan_path(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _pending_sidecar(out: Path) -> Path:
    return sidecar_path(out).with_suffix(".tmp")


def _resume(partial: Path, file: IO[bytes], plan: dict[str, Any], say: Callable[[str], None]) -> np.ndarray:
    """Rows of the images that an earlier attempt at the same file completed; the rest of the file is cut off."""
    same = not _changed_keys(read_json(_plan_path(partial)), plan)
    rows = np.zeros(0, ROW_DTYPE)
    if same and _rows_path(partial).is_file():
        data = _rows_path(partial).read_bytes()
        rows = np.frombuffer(data[: len(data) // ROW_DTYPE.itemsize * ROW_DTYPE.itemsize], ROW_DTYPE)
        ends = rows["place"] + rows["size"]
        rows = rows[
            : int((ends <= partial.stat().st_size).cumprod().sum())
        ]  # after a power cut there may be rows without bytes
        say(f"resumes after {len(rows):,} images that were written before")
    write_atomic(_rows_path(partial), rows.tobytes())
    write_atomic(_plan_path(partial), json.dumps(plan))
    file.truncate(int(rows[-1]["place"] + rows[-1]["size"]) if len(rows) else 0)
    return rows


def _append(
    source: RandomAccessSource,
    settings: Settings,
    partial: Path,
    file: IO[bytes],
    rows: np.ndarray,
    workers: int,
    report: Callable[[int], Any],
) -> np.ndarray:
    """Encode the missing images and append them; returns the rows of all images."""
    blocks = [rows]
    pending = []
    last_sync = time.monotonic()
    start = BetonLayout.data_start(len(source.labels), settings.page)
    end, unsynced = int(rows[-1]["place"] + rows[-1]["size"]) if len(rows) else start, 0
    with open_append(_rows_path(partial)) as journal:

        def sync() -> None:
            os.fsync(file.fileno())
            for block in pending:
                journal.write(block.tobytes())
            journal.flush()
            pending.clear()

        for chunk in encode_chunks(source, settings, len(rows), workers):
            block, offset = chunk.rows.copy(), 0
            for row in block:
                size = int(row["size"])
                if size > settings.page - end % settings.page:
                    end += settings.page - end % settings.page
                row["place"] = end
                _write(file, end, chunk.payload[offset : offset + size])
                end, offset = end + size, offset + size
            blocks.append(block)
            pending.append(block)
            unsynced += offset
            report(len(block))
            if unsynced > SYNC_BYTES or time.monotonic() - last_sync > SYNC_S:
                sync()
                unsynced, last_sync = 0, time.monotonic()
        sync()
    return np.concatenate(blocks)


def _write(file: IO[bytes], offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file.fileno(), view, offset)
        view, offset = view[count:], offset + count


def _finish(
    partial: Path,
    file: IO[bytes],
    out: Path,
    rows: np.ndarray,
    labels: np.ndarray,
    settings: Settings,
    plan: dict[str, Any],
) -> dict[str, Any]:
    """Write header, metadata and allocation table, then give file and sidecar their names."""
    head, tail, end = BetonLayout.encode_index(rows, labels, settings.page)
    _write(file, 0, head)
    file.truncate(end)
    _write(file, end, tail)
    os.fsync(file.fileno())
    index = [[0, len(head)], [end, end + len(tail)]]
    modes = {name: int((rows["mode"] == code).sum()) for name, code in BetonLayout.MODES.items()}
    facts = plan | {
        "ffcv": BetonLayout.VERSION,
        "bytes": end + len(tail),
        "stored": modes,
        "index": index,
        "sha256": digest(partial),
        "index_sha256": digest(partial, *index),
    }
    write_atomic(_pending_sidecar(out), json.dumps(facts, indent=1) + "\n")
    sidecar_path(out).unlink(missing_ok=True)
    os.replace(partial, out)
    _publish_sidecar(partial, out)
    return facts


def _publish_sidecar(partial: Path, out: Path) -> None:
    """Give the finished sidecar its name, and remove the files that only a resumed command needs."""
    os.replace(_pending_sidecar(out), sidecar_path(out))
    for path in (_rows_path(partial), _plan_path(partial)):
        path.unlink(missing_ok=True)

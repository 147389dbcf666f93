"""Copies of the images' files on the disks of the nodes: ``data.stage_to``.

One process of each node copies; the others wait. A file is copied under another name, read again and compared with what
was read from the source; only then it gets its name, so that a copy that was cut short is never taken for a whole one.
A lock on the node keeps two jobs from copying at the same time, and the second one finds what the first one copied.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from dist_prune.data.random_access import Say
from dist_prune.data.source_forms import Copied, StoredFiles
from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.fileio import file_digest, read_json, write_atomic

COPIERS = 8  # threads: a shared file system answers several requests at once
BLOCK = 8 << 20  # bytes that are read at once
POLL_S = 0.2
SYNCED_BYTES = 1 << 20  # files of that size are flushed to the disk one by one
DONE = ".staged.json"  # in a folder of copies, when all of them are there


class _StoppedError(Exception):
    """The run was asked to stop while it copied."""


@dataclass
class _Copying:
    """What the copying process of a node does, and what it tells the others."""

    folder: Path
    splits: Mapping[Any, StoredFiles]
    say: Say
    stop: threading.Event = field(default_factory=threading.Event)
    note: str = ""
    error: str = ""

    def run(self) -> None:
        """Copy what is not there; fills in ``note`` or ``error``."""
        try:
            with _lock(self.folder, self.stop, self.say):
                self.note = _copy_missing(self.folder, self.splits, self.stop, self.say)
        except _StoppedError:
            self.error = "stopped"
        except PruneError as error:
            self.error = str(error)
        except OSError as error:
            self.error = f"data.stage_to: {self.folder}: the images cannot be copied there: {error}"


def stage(
    sources: Mapping[Any, Any], stage_to: str, comm: Communicator, say: Say = lambda text: None, node: str | None = None
) -> dict[Any, Any]:
    """Copy the files of the sources to a folder of the node; a collective.

    Args:
        sources: split -> opened source, the same on every rank.
        stage_to: the recipe's ``data.stage_to``: a folder, which may be another one on each node.
        comm: all processes of the run.
        say: takes lines for the user.
        node: name of this process's machine; None: its host name.

    Returns:
        Split -> the source, which reads the copies.

    Raises:
        PruneError: the images are no files, there is too little space or no permission, or a file changed meanwhile.
        PreemptedError: asked to stop while it copied.
    """
    splits = {key: _files_of(source) for key, source in sources.items()}
    folder = Path(stage_to).expanduser().absolute() / f"dist_prune-{os.getuid()}"
    nodes = comm.all_gather_object((node or socket.gethostname(), str(folder)))
    leader = next(rank for rank, (name, _) in enumerate(nodes) if name == nodes[comm.rank][0])
    copying = _Copying(Path(nodes[leader][1]), splits, say)
    thread = threading.Thread(target=copying.run, daemon=True) if leader == comm.rank else None
    start = time.perf_counter()
    try:
        if thread is not None:
            thread.start()
        _wait(comm, thread, copying)
    finally:
        copying.stop.set()  # after an error elsewhere
        if thread is not None:
            thread.join()
    seconds, others = time.perf_counter() - start, len({name for name, _ in nodes}) - 1
    say(f"data: {copying.note} ({seconds:.1f} s{f'; the same on {others} other nodes' if others else ''})")
    staged = {key: source.read_from(copying.folder / splits[key].key[:32]) for key, source in sources.items()}
    unseen = [key for key, files in splits.items() if not (copying.folder / files.key[:32] / DONE).is_file()]
    blind = [place for place in comm.all_gather_object(str(copying.folder) if unseen else "") if place]
    if blind:
        raise PruneError(
            f"data.stage_to: a process does not see what another one of its node copied to {blind[0]}: name a folder "
            "that all processes of a node share"
        )
    return staged


def _wait(comm: Communicator, thread: threading.Thread | None, copying: _Copying) -> None:
    """Wait for the copies of all nodes. Ranks meet all the time, so that none of them seems to hang."""
    while True:
        finished = thread is None or not thread.is_alive()
        states = comm.all_gather_object((finished, copying.error if finished else ""))
        errors = [error for _, error in states if error]
        if errors:
            raise PruneError(errors[0])
        if all(done for done, _ in states):
            return
        if preemption.poll(comm)[0]:
            raise preemption.preempted_error("while images were copied to the nodes")
        if thread is not None and not finished:
            thread.join(POLL_S)
        else:
            time.sleep(POLL_S)


def _files_of(source: Any) -> StoredFiles:
    if not isinstance(source, Copied):
        raise PruneError(
            "data.stage_to copies image files, shards and .beton files; these images are none: leave it out"
        )
    files = source.stored_files()
    for name in files.names:
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise PruneError(f"data.stage_to: {name!r} lies outside of the data's folder, so it is not copied")
    return files


@contextlib.contextmanager
def _lock(folder: Path, stop: threading.Event, say: Say) -> Iterator[None]:
    """Hold the lock of the folder; the kernel takes it from a process that ends."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or folder.is_symlink():
            raise PruneError(f"data.stage_to: {folder} belongs to another user: name another folder")
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise PruneError(
            f"data.stage_to: {folder} cannot be made or written to: {error.strerror or error}. Name a folder of the "
            "node's own disk"
        ) from error
    try:
        told = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    say(f"data: another job copies images to {folder}; waiting for it")
                told = True
            if stop.wait(POLL_S):
                raise _StoppedError
        yield
    finally:
        os.close(handle)


def _copy_missing(folder: Path, splits: Mapping[Any, StoredFiles], stop: threading.Event, say: Say) -> str:
    """Copy the files that are not there yet; what was done, in words."""
    todo: list[tuple[Path, Path, int]] = []
    count = total = 0
    stored = list({files.key: files for files in splits.values()}.values())  # both splits may be the same files
    for files in stored:
        place = folder / files.key[:32]
        newest = read_json(place / DONE).get("newest")
        for path, name, size in zip(files.paths, files.names, files.sizes.tolist(), strict=True):
            count, total = count + 1, total + size
            if not _is_whole(place / name, size, newest):
                todo.append((path, place / name, size))
    need = sum(size for *_, size in todo)
    text = f"{count:,} files ({_size_text(total)}) of the images are in {folder}"
    if todo:
        free = shutil.disk_usage(folder).free
        if need > free:
            raise PruneError(
                f"data.stage_to: {folder} has {_size_text(free)} free, the images that are not there yet need "
                f"{_size_text(need)}. Name a larger disk, delete old copies in it, or leave data.stage_to out"
            )
        say(f"data: copying {len(todo):,} files ({_size_text(need)}) to {folder}")
        for files in stored:  # from here on they are not complete
            (folder / files.key[:32] / DONE).unlink(missing_ok=True)
        _copy_all(todo, stop)
        text += f"; {len(todo):,} of them were copied now"
    else:
        text += " already"
    for files in stored:
        _mark_complete(folder / files.key[:32], files)
    return text


def _is_whole(copy: Path, size: int, newest: int | None) -> bool:
    """Whether a copy is there, of the size of its source, and was not changed since all were copied."""
    try:
        found = os.lstat(copy)
    except OSError:
        return False
    return found.st_size == size and (newest is None or found.st_mtime_ns <= newest)


def _copy_all(todo: list[tuple[Path, Path, int]], stop: threading.Event) -> None:
    def copy(item: tuple[Path, Path, int]) -> None:
        try:
            copy_file(*item, stop.is_set)
        except BaseException:
            stop.set()  # the other threads need not go on
            raise

    for place in {target.parent for _, target, _ in todo}:
        place.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(COPIERS) as pool:
        results = [pool.submit(copy, item) for item in todo]
    errors = [result.exception() for result in results]
    first = next((error for error in errors if error is not None and not isinstance(error, _StoppedError)), None)
    if first is not None:
        raise first
    if any(errors):
        raise _StoppedError


def copy_file(path: Path, target: Path, size: int, stopped: Callable[[], bool] = lambda: False) -> None:
    """Copy a file under another name, compare the copy with what was read, and give it its name.

    Args:
        path: the file.
        target: the copy.
        size: bytes that the file has to have.
        stopped: whether to give up.

    Raises:
        PruneError: the file has another size, or the disk gives other bytes than were written.
        OSError: it cannot be read or written.
    """
    part, whole = target.with_name(f".{target.name}.part"), hashlib.sha256()
    try:
        with path.open("rb") as reader, part.open("wb") as writer:
            while block := reader.read(BLOCK):
                if stopped():
                    raise _StoppedError
                whole.update(block)
                writer.write(block)
            written = writer.tell()
            writer.flush()
            if size >= SYNCED_BYTES:
                os.fsync(writer.fileno())
        if written != size:
            raise PruneError(
                f"data.stage_to: {path} has {written:,} bytes, and had {size:,} when it was indexed: it was cut short, "
                "replaced or is being written"
            )
        if file_digest(part) != whole.hexdigest():
            raise PruneError(f"data.stage_to: {target} does not hold what was read from {path}: the disk is faulty")
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _mark_complete(place: Path, files: StoredFiles) -> None:
    times = np.array([os.lstat(place / name).st_mtime_ns for name in files.names], dtype=np.int64)
    body = {"files": len(files.names), "bytes": int(files.sizes.sum()), "newest": int(times.max(initial=0))}
    if read_json(place / DONE) != body:
        write_atomic(place / DONE, json.dumps(body))


def _size_text(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"

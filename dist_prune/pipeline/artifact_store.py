"""Tasks of one sweep that need the same artifact: one makes it, the others wait and take it.

A shelf is a folder beside the run directories. ``<stage>-<fingerprint>/`` holds the files and the ledger's facts; it
appears in one rename, and the first to put it there wins. Who makes it holds ``<stage>-<fingerprint>.holder.N``, made
exclusively (whole on NFS, where file locks are not) and touched every few seconds. A holder whose file has not changed
for ``patience`` seconds of a waiter's own clock is taken for dead: the waiter makes ``.holder.N+1``. A preempted holder
leaves its file, so it goes on at once when it is requeued within that time; one that failed takes it away.
"""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_prune.distributed import preemption
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.fileio import canonical, file_digest, read_json, read_text, seal, unseal, write_atomic

HEARTBEAT_S = 5.0
POLL_S = 1.0


@dataclass
class ArtifactStore:
    """Shared artifacts, as one task sees them.

    Attributes:
        folder: where they lie, on a file system that all tasks see.
        owner: this task's run directory.
        patience: seconds without a heartbeat after which a holder is taken for dead.
    """

    folder: Path
    owner: Path
    patience: float
    _seen: dict[str, tuple[int, float]] = field(default_factory=dict)  # holder file -> (its mtime, when first seen so)

    def path(self, key: str) -> Path:
        return self.folder / key

    def try_lease(self, key: str) -> "Lease | str":
        """The right to make an artifact, or in words why not: it is there, or another task is at it."""
        if self.path(key).is_dir():
            return "there"
        latest = max(self._holders(key), default=None)
        if latest is None:
            lease = self._claim(key, 0)
        else:
            number, file = latest
            note = read_json(file)
            if note.get("owner") == str(self.owner):  # this task, before it was preempted or killed
                lease = Lease(file)
            elif not self._dead(file):
                return f"{note.get('owner', 'another task')} on {note.get('host', 'another machine')}"
            else:
                lease = self._claim(key, number + 1)
        if lease is None:
            return "another task"
        if self.path(key).is_dir():  # put there between the two looks
            lease.release()
            return "there"
        return lease

    def _claim(self, key: str, number: int) -> "Lease | None":
        file = self.folder / f"{key}.holder.{number}"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return None
        with os.fdopen(handle, "w") as stream:
            stream.write(canonical({"owner": str(self.owner), "host": os.uname().nodename, "pid": os.getpid()}))
        return Lease(file)

    def _holders(self, key: str) -> list[tuple[int, Path]]:
        files = self.folder.glob(f"{key}.holder.*")
        return [(int(file.suffix[1:]), file) for file in files if file.suffix[1:].isdigit()]

    def _dead(self, file: Path) -> bool:
        try:
            stamp = file.stat().st_mtime_ns
        except OSError:
            return False  # released just now: the next look finds out
        before, since = self._seen.get(str(file), (None, 0.0))
        if stamp != before:
            self._seen[str(file)] = (stamp, time.monotonic())
            return False
        return time.monotonic() - since > self.patience

    def publish(self, key: str, run: Path, names: Iterable[str], facts: dict[str, Any]) -> bool:
        """Publish artifacts of ``run``; False where another task was faster: then its artifacts count."""
        staging = self.folder / f".{key}.{os.uname().nodename}.{os.getpid()}"
        shutil.rmtree(staging, ignore_errors=True)
        digests = {}
        for name in names:
            digests[name] = file_digest(run / name)
            link(run / name, staging / name)
        write_atomic(staging / "line.json", seal({"facts": facts, "outputs": digests, "run": str(run)}))
        try:
            staging.rename(self.path(key))
        except OSError:
            shutil.rmtree(staging, ignore_errors=True)
            if not self.path(key).is_dir():
                raise
            return False
        for _, file in self._holders(key):
            file.unlink(missing_ok=True)
        return True

    def take(self, key: str, run: Path) -> dict[str, Any]:
        """Link the artifacts into ``run``; returns ``line.json``. PruneError where they were altered."""
        artifact = self.path(key)
        line = unseal(read_text(artifact / "line.json")) or {}
        if not {"facts", "outputs", "run"} <= line.keys():
            line = {}
        for name, expected in line.get("outputs", {}).items():
            if not (artifact / name).is_file() or file_digest(artifact / name) != expected:
                line = {}
                break
            link(artifact / name, run / name)
        if not line:
            raise PruneError(f"{artifact} is damaged or was altered; delete it, and the next task makes it anew")
        return line


@dataclass
class Lease:
    """The right to make an artifact; alive while its file is touched."""

    file: Path

    @contextlib.contextmanager
    def heartbeat(self):
        """Touch the file in the background; given back where the work fails, kept where the task is preempted."""
        done = threading.Event()

        def beat() -> None:
            while not done.is_set():
                with contextlib.suppress(OSError):
                    os.utime(self.file)
                done.wait(HEARTBEAT_S)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        except (preemption.PreemptedError, KeyboardInterrupt):
            raise
        except BaseException:
            self.release()
            raise
        finally:
            done.set()
            thread.join()

    def release(self) -> None:
        self.file.unlink(missing_ok=True)


def made_once(
    store: ArtifactStore,
    key: str,
    names: Iterable[str],
    comm: Communicator,
    make: Callable[[], dict[str, Any]],
    run: Path,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], str]:
    """Make artifacts in ``run``, or wait for another task and take its. All ranks call it.

    Args:
        store: where tasks share.
        key: what decides the artifacts.
        names: the files, relative to ``run``.
        comm: this task's processes.
        make: makes and writes the files, returns the facts.
        run: this task's run directory.
        say: tells the user.

    Returns:
        The facts, and the run directory that made them where it was another task's, else "".
    """
    announced = ""
    while True:
        lease = comm.run_on_main(lambda: store.try_lease(key))
        holder = comm.broadcast_object(lease if isinstance(lease, str) else "mine")
        if holder in ("mine", "there"):
            break
        if holder != announced:
            say(f"  {holder} is making it; waiting")
            announced = holder
        if preemption.poll(comm)[0]:
            raise preemption.preempted_error(f"while waiting for {holder}")
        time.sleep(POLL_S)
    if holder == "mine":
        with lease.heartbeat() if isinstance(lease, Lease) else contextlib.nullcontext():
            facts = make()
            first = comm.broadcast_object(comm.run_on_main(lambda: store.publish(key, run, names, facts)))
        if first:
            return facts, ""
    line = comm.broadcast_object(comm.run_on_main(lambda: store.take(key, run))) or {}
    return line["facts"], line["run"]


def link(source: Path, target: Path) -> None:
    """One file under two names where the file system can, else a copy; artifacts are replaced, never written into."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    temporary.replace(target)

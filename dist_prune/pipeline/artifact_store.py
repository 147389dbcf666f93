"""Artifacts that the tasks of one sweep share: one task makes an artifact, the others wait and take it.

The store is a folder beside the run directories. ``<stage>-<fingerprint>/`` contains the files and the ledger's facts;
it appears in one rename, and the first task to publish it wins. The task that makes it owns the lease file
``<stage>-<fingerprint>.holder.N``. That file is created exclusively, which is atomic on NFS where file locks are not,
and is touched every few seconds. If it has not changed for ``patience`` seconds of a waiting task's own clock, the
holder is assumed dead, and the waiting task creates ``.holder.N+1``. A preempted task leaves its lease file, so it
resumes at once if it is requeued within that time. A task that failed removes its file.
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
    """The shared artifacts of a sweep, as one of its tasks sees them.

    Attributes:
        folder: Folder of the artifacts, on a file system that all tasks share. It is created when it is needed.
        owner: Run directory of this task. It identifies the task in lease files.
        patience: Seconds without a heartbeat after which the holder of a lease is assumed dead.
    """

    folder: Path
    owner: Path
    patience: float
    _seen: dict[str, tuple[int, float]] = field(default_factory=dict)  # lease file -> (its mtime, when first seen so)

    def path(self, key: str) -> Path:
        """The folder of a published artifact."""
        return self.folder / key

    def try_lease(self, key: str) -> "Lease | str":
        """Try to get the right to make an artifact.

        Args:
            key: ``<stage>-<fingerprint>`` of the artifact.

        Returns:
            The lease; or the text "there" if the artifact is published; or else the task that makes it, in words.
        """
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
            elif not self._is_dead(file):
                return f"{note.get('owner', 'another task')} on {note.get('host', 'another machine')}"
            else:
                lease = self._claim(key, number + 1)
        if lease is None:
            return "another task"
        if self.path(key).is_dir():  # published between the two checks
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

    def _is_dead(self, file: Path) -> bool:
        try:
            stamp = file.stat().st_mtime_ns
        except OSError:
            return False  # released just now: the next check finds out
        last_stamp, since = self._seen.get(str(file), (None, 0.0))
        if stamp != last_stamp:
            self._seen[str(file)] = (stamp, time.monotonic())
            return False
        return time.monotonic() - since > self.patience

    def publish(self, key: str, run: Path, names: Iterable[str], facts: dict[str, Any]) -> bool:
        """Publish artifacts of a run directory, in one rename, and end the leases on them.

        Args:
            key: ``<stage>-<fingerprint>`` of the artifact.
            run: Run directory that contains the files.
            names: The files, relative to ``run``.
            facts: The stage's facts for the ledger.

        Returns:
            Whether they were published. False if another task was faster: then that task's artifacts count.
        """
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
        """Link published artifacts into a run directory.

        Args:
            key: ``<stage>-<fingerprint>`` of the artifact.
            run: Run directory that gets the files.

        Returns:
            The body of ``line.json``: ``facts``, ``outputs`` (file -> sha256) and ``run`` (the directory of the maker).

        Raises:
            PruneError: A file is missing or was altered.
        """
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
            raise PruneError(f"{artifact} is damaged or was altered; delete it, and the next task makes it again")
        return line


@dataclass
class Lease:
    """The right to make an artifact; it stays valid while its file is touched.

    Attributes:
        file: The lease file in the store.
    """

    file: Path

    @contextlib.contextmanager
    def heartbeat(self):
        """Touch the file in the background while the body runs; release it on failure, keep it on preemption."""
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
        """Give the lease back: another task may make the artifact."""
        self.file.unlink(missing_ok=True)


def make_or_take(
    store: ArtifactStore,
    key: str,
    names: Iterable[str],
    comm: Communicator,
    make: Callable[[], dict[str, Any]],
    run: Path,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], str]:
    """Make artifacts in ``run``, or wait for another task and take its artifacts. All ranks call it.

    Args:
        store: The artifact store of the sweep.
        key: ``<stage>-<fingerprint>``, which decides the artifacts' content.
        names: The files, relative to ``run``.
        comm: The processes of this task.
        make: Makes and writes the files; returns the facts.
        run: Run directory of this task.
        say: Takes a line for the user.

    Returns:
        The facts, and the run directory that they came from ("" if this task made them).

    Raises:
        PruneError: The artifacts of the other task are damaged.
        PreemptedError: This task was preempted while it waited.
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
    """Give a file a second name, by a hard link or else by a copy. Artifacts are replaced, never written into.

    Args:
        source: An existing file.
        target: The second name. An existing file of that name is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    temporary.replace(target)

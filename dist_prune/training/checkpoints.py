"""Training checkpoints: written in the background, verified when read, never a single copy.

``<folder>/step_000000123-<training>.safetensors`` has the whole state after that many steps. The ``.sha256`` beside it
is written last and proves that the file is complete. If the newest checkpoint is damaged, the one before is used.
Trainings by other recipes have checkpoints of their own: after a change of the recipe is undone, its training resumes.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.fileio import digest, file_digest, read_text, write_atomic


@dataclass
class CheckpointManager:
    """The checkpoints of one training.

    Attributes:
        folder: has nothing but checkpoints.
        identity: the training that a checkpoint must belong to; others are left alone.
        keep: number of checkpoints of this identity that are kept.
        say: called with a line about each damaged checkpoint.
    """

    folder: Path
    identity: str
    keep: int = 2
    say: Callable[[str], None] = print
    _writer: threading.Thread | None = field(default=None, repr=False)
    _failure: list[PruneError] = field(default_factory=list, repr=False)

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Copy a state now and write it in the background; called on rank 0 only.

        Args:
            step: number of updates so far.
            tensors: name -> tensor, on any device.
            meta: JSON values by key.

        Raises:
            PruneError: the previous checkpoint could not be written.
        """
        self.wait()
        data = tensor_files.encode(tensors, {**meta, "identity": self.identity, "step": step})
        self._writer = threading.Thread(target=self._write, args=(step, data), name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk; called on rank 0 only.

        Raises:
            PruneError: it could not be written.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure:
            raise self._failure.pop()

    def newest(self) -> str | None:
        """The file name of the newest complete checkpoint of this training, or None; no collective."""
        for path in reversed(self._own_files()):
            try:
                is_complete = is_verified(path) and tensor_files.read_tensors(path)[1].get("identity") == self.identity
            except PruneError:
                is_complete = False
            if is_complete:
                return path.name
            self.say(f"  the checkpoint {path} is damaged or cut short: going back to the one before")
        return None

    def load(self, comm: Communicator) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Load the newest complete checkpoint of this training; a collective, rank 0 chooses the file.

        Args:
            comm: all processes.

        Returns:
            Name -> tensor, on the CPU, and the meta, the same on every rank; None if there is no checkpoint.
        """
        newest = comm.broadcast_object(comm.run_on_main(self.newest))
        return None if newest is None else tensor_files.read_tensors(self.folder / newest)

    def other_trainings(self) -> list[Path]:
        """Checkpoints of trainings by other recipes in the same folder."""
        return sorted(set(self.folder.glob("step_*.safetensors")) - set(self._own_files()))

    @property
    def _name(self) -> str:
        return digest(self.identity)[:12]

    def _own_files(self) -> list[Path]:
        return sorted(self.folder.glob(f"step_*-{self._name}.safetensors"))

    def _write(self, step: int, data: bytes) -> None:
        path = self.folder / f"step_{step:09}-{self._name}.safetensors"
        try:
            for file in (path, path.with_suffix(".sha256")):
                move_aside(file)
            write_atomic(path, data)
            write_atomic(path.with_suffix(".sha256"), digest(data))
        except PruneError as error:
            self._failure.append(error)
            return
        for old in self._own_files()[: -self.keep]:
            with contextlib.suppress(OSError):  # a folder that somebody put there stays
                old.with_suffix(".sha256").unlink(missing_ok=True)
                old.unlink(missing_ok=True)


def move_aside(path: Path) -> None:
    """Rename a folder that has the path of a checkpoint, which would be in the way when the training gets there.

    Args:
        path: of a checkpoint or its proof; files and missing ones stay as they are.
    """
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            path.rename(path.with_name(f"{path.name}.aside.{time.time_ns()}"))


def is_verified(path: Path) -> bool:
    """Whether a checkpoint and its proof are files, and the proof has the checkpoint's sha256.

    Args:
        path: of the checkpoint.
    """
    proof = path.with_suffix(".sha256")
    return path.is_file() and proof.is_file() and read_text(proof) == file_digest(path)

"""Training checkpoints: written beside the training, verified when read, never the only copy.

``<folder>/step_000000123-<training>.safetensors`` holds the whole state after that many steps; ``.sha256`` beside it is
written last and proves that the file is whole. A newest checkpoint that is damaged falls back to the one before.
Trainings by other recipes keep theirs apart: whoever takes a change of the recipe back goes on where that one was.
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
        folder: theirs alone.
        identity: what a checkpoint must belong to; others are left alone.
        keep: how many are kept, of this identity.
        say: tells the user about damaged ones.
    """

    folder: Path
    identity: str
    keep: int = 2
    say: Callable[[str], None] = print
    _writer: threading.Thread | None = field(default=None, repr=False)
    _failure: list[PruneError] = field(default_factory=list, repr=False)

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Take a copy now, write it in the background; a failed write is raised at the next call."""
        self.wait()
        data = tensor_files.encode(tensors, {**meta, "identity": self.identity, "step": step})
        self._writer = threading.Thread(target=self._write, args=(step, data), name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Until the last checkpoint is on the disk; raises what went wrong there."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure:
            raise self._failure.pop()

    def newest(self) -> str | None:
        """The file name of the newest whole checkpoint of this training, or None."""
        for path in reversed(self._mine()):
            try:
                whole = is_verified(path) and tensor_files.read_tensors(path)[1].get("identity") == self.identity
            except PruneError:
                whole = False
            if whole:
                return path.name
            self.say(f"  the checkpoint {path} is damaged or cut short: going back to the one before")
        return None

    def load(self, comm: Communicator) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors, on the CPU, and meta of the newest whole checkpoint, the same on all ranks; None if there is none.

        Every rank calls it; the first one decides which file is read.
        """
        newest = comm.broadcast_object(comm.run_on_main(self.newest))
        return None if newest is None else tensor_files.read_tensors(self.folder / newest)

    def other_trainings(self) -> list[Path]:
        """Checkpoints of trainings by other recipes in the same folder."""
        return sorted(set(self.folder.glob("step_*.safetensors")) - set(self._mine()))

    @property
    def _name(self) -> str:
        return digest(self.identity)[:12]

    def _mine(self) -> list[Path]:
        return sorted(self.folder.glob(f"step_*-{self._name}.safetensors"))

    def _write(self, step: int, data: bytes) -> None:
        path = self.folder / f"step_{step:09}-{self._name}.safetensors"
        try:
            for place in (path, path.with_suffix(".sha256")):
                move_aside(place)
            write_atomic(path, data)
            write_atomic(path.with_suffix(".sha256"), digest(data))
        except PruneError as error:
            self._failure.append(error)
            return
        for old in self._mine()[: -self.keep]:
            with contextlib.suppress(OSError):  # what somebody put in its place (a folder) is theirs
                old.with_suffix(".sha256").unlink(missing_ok=True)
                old.unlink(missing_ok=True)


def move_aside(path: Path) -> None:
    """A folder in a checkpoint's place is renamed: the training that goes on before it comes there again."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            path.rename(path.with_name(f"{path.name}.aside.{time.time_ns()}"))


def is_verified(path: Path) -> bool:
    """Whether a checkpoint is the file that its proof beside it was written for, whatever lies in either's place."""
    proof = path.with_suffix(".sha256")
    return path.is_file() and proof.is_file() and read_text(proof) == file_digest(path)

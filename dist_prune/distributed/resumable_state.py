"""The state of a long computation in one file: a run that was stopped resumes inside the computation."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_prune.distributed import tensor_files
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError


def identity_of(*parts: Any) -> str:
    """sha256 in hex of everything that decides a computation; each part has the same ``repr`` in every process."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class ResumableState:
    """Named tensors and a few plain values, the same on all ranks. The first rank writes, every rank reads.

    A file that is missing, damaged (also by one flipped bit) or of another identity holds nothing: the computation
    starts over.

    Attributes:
        file: where the state is kept, or None to keep nothing.
        identity: the computation that the state belongs to.
        comm: all processes; they call each method together.
    """

    file: Path | None
    identity: str
    comm: Communicator

    def save(self, tensors: Mapping[str, Tensor], **meta: Any) -> None:
        """Replace the state, atomically.

        Args:
            tensors: of any shape and dtype, on any device.
            meta: JSON values.

        Raises:
            PruneError: the disk refuses; the state from before is intact.
        """
        file = self.file
        if file is not None:
            self.comm.run_on_main(lambda: tensor_files.save_sealed(file, tensors, {"identity": self.identity, **meta}))

    def load(self, damaged: Callable[[], None] = lambda: None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors, on the CPU, and the meta of the last ``save``; ({}, {}) if the file holds nothing.

        Args:
            damaged: called if the file is damaged.
        """
        if self.file is None:
            return {}, {}
        tensors, meta = {}, {}
        if os.path.lexists(self.file):
            try:
                tensors, meta = tensor_files.read_sealed(self.file)
            except PruneError:
                damaged()
        own = str(meta.get("seal", "")) if meta.get("identity") == self.identity else ""
        seals = set(self.comm.all_gather_object(own))  # all ranks read the same bytes, or nothing
        return (tensors, meta) if seals == {own} and own else ({}, {})

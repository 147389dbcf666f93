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
    """The sha256 in hex of everything that decides a computation.

    Args:
        parts: values whose ``repr`` is the same in every process.
    """
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class ResumableState:
    """Named tensors and a few plain values, the same on all ranks. Rank 0 writes, every rank reads.

    A file that is missing, damaged (even by one flipped bit) or of another identity counts as empty: the computation
    starts over. ``save`` and ``load`` are collectives: every rank calls them.

    Attributes:
        file: the safetensors file of the state, or None to keep nothing.
        identity: the computation that the state belongs to.
        comm: all processes.
    """

    file: Path | None
    identity: str
    comm: Communicator

    def save(self, tensors: Mapping[str, Tensor], **meta: Any) -> None:
        """Replace the file's state, atomically.

        Args:
            tensors: name -> tensor of any shape and dtype, on any device.
            meta: JSON values by key.

        Raises:
            PruneError: on every rank, if the disk refuses; the previous state is intact.
        """
        file = self.file
        if file is not None:
            self.comm.run_on_main(lambda: tensor_files.save_sealed(file, tensors, {"identity": self.identity, **meta}))

    def load(self, damaged: Callable[[], None] = lambda: None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read the last state that was saved.

        Args:
            damaged: called on each rank that finds the file damaged.

        Returns:
            The tensors, on the CPU, and the meta of the last ``save``; ({}, {}) if the file is missing, damaged or of
            another identity.
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

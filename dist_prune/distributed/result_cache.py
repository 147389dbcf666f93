"""A persistent cache of small results: JSON lines that are only appended, each with the identity that it belongs to."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.fileio import append_lines, canonical, read_text, seal, unseal


class ResultCache:
    """Results by job, the same on every rank; rank 0 writes the file.

    Lines of another identity stay in the file, unread. Creating a cache and ``add`` are collectives: every rank calls
    them.

    Args:
        file: the JSON lines, or None to keep the results in memory only.
        identity: the computation that the results belong to.
        comm: all processes.
    """

    def __init__(self, file: Path | None, identity: str, comm: Communicator):
        self.file = file
        self.identity = identity
        self.comm = comm
        self._known: dict[str, Any] = comm.broadcast_object(comm.run_on_main(self._read)) or {}

    def _read(self) -> dict[str, Any]:
        """Complete lines of this identity; a line that a crash cut off is left out."""
        results: dict[str, Any] = {}
        if self.file is None:
            return results
        for text in read_text(self.file).splitlines():
            line = unseal(text)
            if line is not None and line.get("of") == self.identity and {"job", "result"} <= line.keys():
                results[canonical(line["job"])] = line["result"]
        return results

    def __contains__(self, job: Any) -> bool:
        return canonical(job) in self._known

    def __getitem__(self, job: Any) -> Any:
        return self._known[canonical(job)]

    def add(self, results: Iterable[tuple[Any, Any]]) -> None:
        """Add results to the cache and append them to its file; a collective, called by every rank.

        Args:
            results: (job, result) pairs of JSON values, the same on every rank.

        Raises:
            PruneError: on every rank, if the folder or the file cannot be written.
        """
        pairs = list(results)
        self._known |= {canonical(job): result for job, result in pairs}
        if self.file is not None and pairs:
            lines = [seal({"of": self.identity, "job": job, "result": result}) for job, result in pairs]
            self.comm.run_on_main(lambda: self._append(lines))

    def _append(self, lines: list[str]) -> None:
        assert self.file is not None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PruneError(f"could not make {self.file.parent}: {error.strerror or error}") from error
        append_lines(self.file, lines)

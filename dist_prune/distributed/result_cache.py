"""A lasting record of small results: JSON lines that are only ever appended, each with what it belongs to."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.fileio import append_lines, canonical, read_text, seal, unseal


class ResultCache:
    """Results by job, on every rank; the first rank writes. Lines of another identity stay in the file, unread."""

    def __init__(self, file: Path | None, identity: str, comm: Communicator):
        self.file, self.identity, self.comm = file, identity, comm
        self._known: dict[str, Any] = comm.broadcast_object(comm.run_on_main(self._read)) or {}

    def _read(self) -> dict[str, Any]:
        """Whole lines of this identity; one that a crash cut off is left out."""
        found: dict[str, Any] = {}
        if self.file is None:
            return found
        for text in read_text(self.file).splitlines():
            line = unseal(text)
            if line is not None and line.get("of") == self.identity and {"job", "result"} <= line.keys():
                found[canonical(line["job"])] = line["result"]
        return found

    def __contains__(self, job: Any) -> bool:
        return canonical(job) in self._known

    def __getitem__(self, job: Any) -> Any:
        return self._known[canonical(job)]

    def add(self, results: Iterable[tuple[Any, Any]]) -> None:
        """(job, result) pairs, JSON values, the same on every rank; called by all."""
        found = list(results)
        self._known |= {canonical(job): result for job, result in found}
        if self.file is not None and found:
            lines = [seal({"of": self.identity, "job": job, "result": result}) for job, result in found]
            self.comm.run_on_main(lambda: self._append(lines))

    def _append(self, lines: list[str]) -> None:
        assert self.file is not None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PruneError(f"could not make {self.file.parent}: {error.strerror or error}") from error
        append_lines(self.file, lines)

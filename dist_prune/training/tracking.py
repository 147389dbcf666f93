"""Output of a running run: lines and progress bars on rank 0, metrics.jsonl, and trackers such as TensorBoard."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dist_prune.errors import PruneError, unknown
from dist_prune.fileio import open_append, write_atomic
from dist_prune.training.progress import Clock, Meter

T = TypeVar("T")
PROGRESS = "progress.json"
QUIET = "DIST_PRUNE_QUIET"  # variable: print errors only


class Tracker:
    """Prints and writes on rank 0 only; every rank may call it. A tracker that fails is switched off.

    With the variable ``QUIET`` set it writes and does not print.
    """

    def __init__(self, talks: bool, boards: Sequence[str] = (), folder: Path | None = None, name: str = "dist_prune"):
        """Make a tracker; without a folder it prints only.

        Args:
            talks: whether this rank prints and writes.
            boards: accelerate's names of trackers ("tensorboard", "wandb", ...).
            folder: the run directory, for metrics.jsonl and TensorBoard's files.
            name: the run's project in other trackers.
        """
        self.talks = talks
        self._prints = talks and not os.environ.get(QUIET)
        self._clock = Clock()
        self._lines_file = folder / "metrics.jsonl" if folder is not None else None
        self._boards: dict[str, Any] = {}
        self._wanted = tuple(boards) if talks and folder is not None else ()  # started at the first value
        self._folder, self._name = folder, name

    def info(self, text: str) -> None:
        """Print a line."""
        if self._prints:
            print(text, flush=True)

    def meter(self, total: int, what: str, first: int = 0, later: int = 0) -> Meter:
        """Progress of a piece of work that is no loop; see ``Meter`` for the arguments."""
        note = self._note if self.talks and self._folder is not None else None
        return Meter(self.info if self._prints else None, self._clock, total, what, first, later, note)

    def bar(self, items: Iterable[T], total: int, what: str, later: int = 0) -> Iterator[T]:
        """Iterate over items with a progress bar on a terminal, with a line a minute elsewhere.

        Args:
            items: passed through, on every rank.
            total: their number.
            what: name of the work.
            later: items of the same kind that follow (those of further epochs).
        """
        meter = self.meter(total, what, later=later)
        try:
            for done, item in enumerate(items, start=1):
                yield item
                meter.update(done)
        finally:
            meter.close()

    def _note(self, progress: dict[str, Any]) -> None:
        """Keep the progress of a piece of work in the run directory, for ``dist-prune status``."""
        assert self._folder is not None
        with contextlib.suppress(PruneError):  # a full disk says so where it matters
            write_atomic(self._folder / PROGRESS, json.dumps(progress | {"at": time.time()}))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers to all trackers.

        Args:
            values: tag ``section/name`` -> number.
            step: number of the epoch or update.
        """
        self._each(lambda name, board: board.log(dict(values), step=step))

    def log_jsonl(self, values: Mapping[str, Any]) -> None:
        """Append a line of JSON values to metrics.jsonl of the run directory."""
        if self.talks and self._lines_file is not None:
            try:
                with open_append(self._lines_file) as file:
                    file.write((json.dumps(dict(values)) + "\n").encode())
            except OSError as error:
                _warn_off(error, "metrics.jsonl")
                self._lines_file = None

    def figure(self, tag: str, figure: Any) -> None:
        """Log a matplotlib figure to TensorBoard."""
        self._each(lambda name, board: board.tracker.add_figure(tag, figure) if name == "tensorboard" else None)

    def histogram(self, tag: str, values: Any, step: int) -> None:
        """Log the distribution of a tensor's values to TensorBoard."""
        self._each(lambda n, board: board.tracker.add_histogram(tag, values, step) if n == "tensorboard" else None)

    def image(self, tag: str, pixels: Any) -> None:
        """Log an image, uint8 (H, W, 3), to TensorBoard."""
        self._each(
            lambda name, board: (
                board.tracker.add_image(tag, pixels, dataformats="HWC") if name == "tensorboard" else None
            )
        )

    def text(self, tag: str, markdown: str) -> None:
        """Log a text in Markdown to TensorBoard."""
        self._each(lambda name, board: board.tracker.add_text(tag, markdown) if name == "tensorboard" else None)

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Log the recipe's keys (``values``) with the final metrics to all trackers; columns stand in their order."""
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in values.items()}

        def note(name: str, board: Any) -> None:
            if name == "tensorboard":
                board.tracker.add_hparams(plain, dict(metrics), run_name=".")
            else:
                board.store_init_configuration(plain)
                board.log(dict(metrics))

        self._each(note)

    def close(self) -> None:
        """Finish every tracker that was started."""
        self._wanted = ()
        self._each(lambda name, board: board.finish())
        self._boards = {}

    def _start(self) -> None:
        """Start the trackers: a run that fails before its first value leaves no empty run in them."""
        wanted, self._wanted = self._wanted, ()
        for board in wanted:
            try:
                self._boards[board] = _board(board, self._folder or Path(), self._name)
            except Exception as error:
                _warn_off(error, board)

    def _each(self, log: Callable[[str, Any], Any]) -> None:
        self._start()
        for name, board in list(self._boards.items()):
            try:
                log(name, board)
            except Exception as error:  # a full disk or a broken tracker must not end a training
                del self._boards[name]
                _warn_off(error, name)


def check(names: Sequence[str]) -> None:
    """Check the recipe's trackers.

    Args:
        names: accelerate's names of trackers.

    Raises:
        PruneError: accelerate does not know one, or it is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers  # commands that check none do not wait

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise PruneError(f"report.trackers: {unknown('tracker', name, list(LOGGER_TYPE_TO_CLASS))}")
        if name not in {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}:
            raise PruneError(f"report.trackers: {name} is not installed; pip install {name.replace('_', '-')}")


def _board(name: str, folder: Path, project: str) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        board = kind("tensorboard", logging_dir=folder)
    else:
        board = kind(project, logging_dir=folder / name) if kind.requires_logging_directory else kind(project)
    board.start()
    return board


def _warn_off(error: Exception, what: str) -> None:
    print(f"{what} is off from here on: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

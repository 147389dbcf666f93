"""What a run shows while it works: lines and bars on the first rank, trackers beside them."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from tqdm import tqdm

from dist_prune.errors import PruneError, unknown
from dist_prune.fileio import open_append

T = TypeVar("T")
PLAIN_EVERY_S = 5.0


class Tracker:
    """Talks on the first rank, is silent on the others. A tracker that fails never stops the run."""

    def __init__(self, talks: bool, boards: Sequence[str] = (), folder: Path | None = None, name: str = "dist_prune"):
        """Nothing is written without a folder.

        Args:
            talks: whether this rank prints and writes.
            boards: accelerate's names of trackers ("tensorboard", "wandb", ...).
            folder: the run directory; metrics.jsonl and TensorBoard's files lie there.
            name: the project under which other trackers file the run.
        """
        self.talks = talks
        self._lines_file = folder / "metrics.jsonl" if folder is not None else None
        self._boards: dict[str, Any] = {}
        if not talks or folder is None:
            return
        for board in boards:
            try:
                self._boards[board] = _board(board, folder, name)
            except Exception as error:
                _off(error, board)

    def info(self, text: str) -> None:
        """One line for the user."""
        if self.talks:
            print(text, flush=True)

    def bar(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """Pass ``items`` through with a progress bar and ETA: a bar on a terminal, plain lines elsewhere."""
        if not self.talks:
            yield from items
        elif sys.stderr.isatty():
            yield from tqdm(items, desc=what, total=total, leave=False, dynamic_ncols=True)
        else:
            yield from self._lines(items, total, what)

    def _lines(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        start = said = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            now = time.monotonic()
            if now - said >= PLAIN_EVERY_S and done < total:
                said = now
                left = (now - start) / done * (total - done)
                self.info(f"  {what}: {done}/{total}, {left:.0f} s left")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers under ``section/name`` tags."""
        self._each(lambda name, board: board.log(dict(values), step=step))

    def log_jsonl(self, values: Mapping[str, Any]) -> None:
        """One JSON line in metrics.jsonl of the run directory."""
        if self.talks and self._lines_file is not None:
            try:
                with open_append(self._lines_file) as file:
                    file.write((json.dumps(dict(values)) + "\n").encode())
            except OSError as error:
                _off(error, "metrics.jsonl")
                self._lines_file = None

    def figure(self, tag: str, figure: Any) -> None:
        """A matplotlib figure, for TensorBoard."""
        self._each(lambda name, board: board.tracker.add_figure(tag, figure) if name == "tensorboard" else None)

    def histogram(self, tag: str, values: Any, step: int) -> None:
        """A tensor's distribution, for TensorBoard."""
        self._each(lambda n, board: board.tracker.add_histogram(tag, values, step) if n == "tensorboard" else None)

    def image(self, tag: str, pixels: Any) -> None:
        """Pixels (H, W, 3) in uint8, for TensorBoard."""
        self._each(
            lambda name, board: (
                board.tracker.add_image(tag, pixels, dataformats="HWC") if name == "tensorboard" else None
            )
        )

    def text(self, tag: str, markdown: str) -> None:
        """A text in Markdown, for TensorBoard."""
        self._each(lambda name, board: board.tracker.add_text(tag, markdown) if name == "tensorboard" else None)

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """The run's keys with its final metrics."""
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in values.items()}

        def note(name: str, board: Any) -> None:
            if name == "tensorboard":
                board.tracker.add_hparams(plain, dict(metrics), run_name=".")
            else:
                board.store_init_configuration(plain)
                board.log(dict(metrics))

        self._each(note)

    def close(self) -> None:
        """Let every tracker finish."""
        self._each(lambda name, board: board.finish())
        self._boards = {}

    def _each(self, act: Callable[[str, Any], Any]) -> None:
        for name, board in list(self._boards.items()):
            try:
                act(name, board)
            except Exception as error:  # a full disk or a broken tracker must not end a training
                del self._boards[name]
                _off(error, name)


def check(names: Sequence[str]) -> None:
    """PruneError for trackers that accelerate does not know or that are not installed."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise PruneError(f"report.trackers: {unknown('tracker', name, list(LOGGER_TYPE_TO_CLASS))}")
        if name not in {str(getattr(found, "value", found)) for found in get_available_trackers()}:
            raise PruneError(f"report.trackers: {name} is not installed; pip install {name.replace('_', '-')}")


def _board(name: str, folder: Path, project: str) -> Any:
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        board = kind("tensorboard", logging_dir=folder)
    else:
        board = kind(project, logging_dir=folder / name) if kind.requires_logging_directory else kind(project)
    board.start()
    return board


def _off(error: Exception, what: str) -> None:
    print(f"{what} is off from here on: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

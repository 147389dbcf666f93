"""What a run shows while it works: lines and bars on the first rank, TensorBoard beside them."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
PLAIN_EVERY_S = 5.0


class Tracker:
    """Talks on the first rank, is silent on the others. A tracker that fails never stops the run."""

    def __init__(self, talks: bool, folder: Path | None = None, lines: Path | None = None):
        """``talks``: whether this rank prints and writes; ``folder``: TensorBoard's; ``lines``: metrics.jsonl."""
        self._lines_file = lines
        self.talks = talks
        self._writer: Any = None
        if talks and folder is not None:
            try:
                self._writer = _writer(folder)
            except Exception as error:
                _off(error)

    def say(self, text: str) -> None:
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
                self.say(f"  {what}: {done}/{total}, {left:.0f} s left")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers under ``section/name`` tags."""
        for tag, value in values.items():
            self._guard(lambda tag=tag, value=value: self._writer.add_scalar(tag, value, step))

    def line(self, values: Mapping[str, Any]) -> None:
        """One JSON line in metrics.jsonl of the run directory."""
        if self.talks and self._lines_file is not None:
            try:
                with self._lines_file.open("a") as file:
                    file.write(json.dumps(dict(values)) + "\n")
            except OSError as error:
                _off(error, "metrics.jsonl")
                self._lines_file = None

    def figure(self, tag: str, figure: Any) -> None:
        """A matplotlib figure."""
        self._guard(lambda: self._writer.add_figure(tag, figure))

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """The run's keys with its final metrics, for TensorBoard's HPARAMS page."""
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in values.items()}
        self._guard(lambda: self._writer.add_hparams(plain, dict(metrics), run_name="."))

    def close(self) -> None:
        self._guard(lambda: self._writer.close())
        self._writer = None

    def _guard(self, act: Any) -> None:
        if self._writer is None:
            return
        try:
            act()
        except Exception as error:  # a full disk or a broken writer must not end a training
            self._writer = None
            _off(error)


def _off(error: Exception, what: str = "TensorBoard") -> None:
    print(f"{what} is off from here on: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))

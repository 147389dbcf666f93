"""Progress of one piece of work with the time that is left: a bar on a terminal, a line a minute elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

PLAIN_EVERY_S = 60.0  # seconds between two lines where there is no terminal, over all pieces of work
NOTED_EVERY_S = 10.0  # seconds between two notes for `dist-prune status`
SETTLED_S = 1.0  # seconds of work before the first estimate: the first items load what the others use


class Clock:
    """The times of the last plain line and the last note, which the pieces of work of a run share.

    Attributes:
        printed_at: time of ``time.monotonic()``.
        noted_at: the same.
    """

    def __init__(self):
        self.printed_at = self.noted_at = time.monotonic()


class Meter:
    """Shows how many items of a piece of work are done, and the time that the others will take.

    Args:
        say: prints a line; None: nothing is shown.
        clock: shared by the meters of a run.
        total: number of items.
        what: name of the work.
        first: items that were done before.
        later: items of the same kind that follow this piece of work (those of further epochs).
        note: keeps ``what``, ``done``, ``total`` and ``seconds_left`` (of later items too) for other programs.
    """

    def __init__(
        self,
        say: Callable[[str], None] | None,
        clock: Clock,
        total: int,
        what: str,
        first: int = 0,
        later: int = 0,
        note: Callable[[dict[str, Any]], None] | None = None,
    ):
        self._say, self._clock, self._note = say, clock, note
        self._total, self._what, self._first, self._later = total, what, first, later
        self._start = time.monotonic()
        self._bar: tqdm | None = None
        if say is not None and sys.stderr.isatty():
            self._bar = tqdm(desc=what, total=total, initial=first, leave=False, dynamic_ncols=True)

    def update(self, done: int, ran: int | None = None) -> None:
        """Show that items are done.

        Args:
            done: their number so far, with those that were done before.
            ran: those of them whose time counts; None: all but the first ones. Others were found done.
        """
        if self._say is None and self._note is None:
            return
        now = time.monotonic()
        each = (now - self._start) / max(1, done - self._first if ran is None else ran)
        left = each * (self._total - done + self._later)
        if self._note is not None and now - self._clock.noted_at >= NOTED_EVERY_S:
            self._clock.noted_at = now
            self._note({"what": self._what, "done": done, "total": self._total, "seconds_left": left})
        if self._say is None:
            return
        if self._bar is not None:
            if self._later and now - self._start > SETTLED_S:
                text = f"{duration(left)} in all"
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif now - self._clock.printed_at >= PLAIN_EVERY_S and done < self._total:
            self._clock.printed_at = now
            in_all = f", {duration(left)} in all" if self._later else ""
            self._say(f"  {self._what}: {done}/{self._total}, {duration(each * (self._total - done))} left{in_all}")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Seconds as a text: ``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_of_hour} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

"""What a person is told when something is wrong: what, where, what is allowed, what to do."""

import contextlib
import difflib
import math
import re
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

LONGEST_SHOWN = 200  # characters of a value that an error repeats
MISSED = (
    3  # exit code of a run that is finished, and whose network is not as large as its target asks (target.tolerance)
)


class PruneError(ValueError):
    """An error whose text is written for the user; the command line prints it without a traceback.

    A word of more than 200 characters is some value that was given (a path, a name): its beginning says enough.

    Attributes:
        code: the exit code of a command that ends with it.
    """

    code = 2

    def __init__(self, *parts: Any):
        super().__init__(*(_cut(part) if isinstance(part, str) else part for part in parts))


LONGEST_PATH, LONGEST_STEP = 4000, 255  # what Linux takes: characters of a path, bytes of one name in it


def _cut(text: str) -> str:
    return re.sub(rf"\S{{{LONGEST_SHOWN + 1},}}", lambda word: f"{word[0][: LONGEST_SHOWN - 30]}...", text)


def shown(value: Any) -> str:
    """A value as an error repeats it: its ``repr``, at most 200 characters of it, its size where more is left out."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**50:
        return f"a whole number of about {int(math.log10(2) * value.bit_length()) + 1} digits"
    if isinstance(value, str | bytes):
        text = repr(value[: LONGEST_SHOWN + 1])
    else:
        text = "a value that cannot be written out"
        with contextlib.suppress(ValueError, RecursionError):  # whole numbers of thousands of digits inside, depth
            text = repr(value)
    if len(text) <= LONGEST_SHOWN:
        return text
    size = f" ({len(value):,} in all)" if isinstance(value, Sized) else ""
    return f"{text[: LONGEST_SHOWN - 30]} ...{size}"


def path_trouble(text: str) -> str:
    """Why a text cannot be the path of any file, or nothing: asking the system for it would raise, not answer."""
    if "\0" in text:
        return f"{shown(text)} holds a zero byte, which no path can"
    if len(text) > LONGEST_PATH:
        return f"{shown(text)} is too long for a path ({LONGEST_PATH:,} characters are the most)"
    longest = max(Path(text).parts, key=lambda part: len(part.encode(errors="replace")), default="")
    if len(longest.encode(errors="replace")) > LONGEST_STEP:
        return f"{shown(longest)} is too long for the name of a file or folder ({LONGEST_STEP} bytes are the most)"
    return ""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` where something allowed looks like ``name``, else an empty string."""
    if len(name) > LONGEST_SHOWN:  # nothing is that long, and looking is slow
        return ""
    found = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def abbreviate(names: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """The first ``most`` names in one text, and how many more there are."""
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def unknown(kind: str, name: str, allowed: Iterable[str]) -> str:
    """A sentence for an unknown name: what it is, the nearest one, all that are allowed."""
    names = sorted(allowed)
    listed = ", ".join(names) if len(names) <= 24 else ", ".join(names[:24]) + f", ... ({len(names)} in all)"
    return f"unknown {kind} {shown(name)}.{nearest(name, names)} Allowed: {listed}."

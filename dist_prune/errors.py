"""Errors for users: the key, its value, the allowed values, the nearest name, and the remedy."""

import contextlib
import difflib
import math
import re
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

LONGEST_SHOWN = 200  # characters of a value that an error repeats
MISSED = 3  # exit code of a finished run whose network misses its target by more than target.tolerance


class PruneError(ValueError):
    """An error whose text is written for the user; the command line prints it without a traceback.

    A word of more than 200 characters (a path, a name) is cut to its beginning.

    Attributes:
        code: the exit code of a command that ends with it.
    """

    code = 2

    def __init__(self, *args: Any):
        super().__init__(*(_shorten_words(arg) if isinstance(arg, str) else arg for arg in args))


LONGEST_PATH = 4000  # characters of a path on Linux
LONGEST_STEP = 255  # bytes of one name in it


def _shorten_words(text: str) -> str:
    return re.sub(rf"\S{{{LONGEST_SHOWN + 1},}}", lambda word: f"{word[0][: LONGEST_SHOWN - 30]}...", text)


def import_problem(error: ImportError, needs: str, extra: str) -> PruneError:
    """The error of an optional package that cannot be imported.

    Args:
        error: what the import raised.
        needs: what needs the package, the recipe key first: ``"data.source: 'parquet' needs pyarrow"``.
        extra: the extra of dist-prune that brings it.

    Returns:
        An error that says whether the package is missing, or is there and does not go with another one.
    """
    if isinstance(error, ModuleNotFoundError):
        return PruneError(f"{needs}; {error.name} is not installed: pip install 'dist-prune[{extra}]'")
    return PruneError(
        f"{needs}, which is installed but cannot be imported: {error}. Its version does not go with those of other "
        f"packages: pip install --upgrade 'dist-prune[{extra}]' brings versions that do"
    )


def shown(value: Any) -> str:
    """A value as an error repeats it.

    Args:
        value: a value of any type, also one that fails to be printed.

    Returns:
        Its ``repr``; the first 170 characters and its size if that is longer than 200.
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**50:
        return f"a whole number of about {int(math.log10(2) * value.bit_length()) + 1} digits"
    if isinstance(value, str | bytes):
        text = repr(value[: LONGEST_SHOWN + 1])
    else:
        text = "a value that cannot be written out"
        with contextlib.suppress(ValueError, RecursionError):  # it holds numbers of thousands of digits, or is too deep
            text = repr(value)
    if len(text) <= LONGEST_SHOWN:
        return text
    size = f" ({len(value):,} in all)" if isinstance(value, Sized) else ""
    return f"{text[: LONGEST_SHOWN - 30]} ...{size}"


def path_trouble(text: str) -> str:
    """Say why a text cannot be the path of any file; the system would raise instead of answering for it.

    Returns:
        A clause for an error, or an empty text if the text can be a path.
    """
    if "\0" in text:
        return f"{shown(text)} holds a zero byte, which no path can"
    if len(text) > LONGEST_PATH:
        return f"{shown(text)} is too long for a path ({LONGEST_PATH:,} characters are the most)"
    longest = max(Path(text).parts, key=lambda name: len(name.encode(errors="replace")), default="")
    if len(longest.encode(errors="replace")) > LONGEST_STEP:
        return f"{shown(longest)} is too long for the name of a file or folder ({LONGEST_STEP} bytes are the most)"
    return ""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Suggest the allowed name that looks most like ``name``.

    Returns:
        `` Did you mean 'x'?`` with a leading blank, or an empty text if none is similar.
    """
    if len(name) > LONGEST_SHOWN:  # no name is that long, and the search would be slow
        return ""
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def abbreviate(names: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """List the first ``most`` names in one text, and say how many more there are."""
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def unknown(kind: str, name: str, allowed: Iterable[str]) -> str:
    """The error for an unknown name.

    Args:
        kind: what the name should name, for example ``method``.
        name: the unknown name.
        allowed: all known names.

    Returns:
        A text with the name, the nearest known name, and the known names (24 at most).
    """
    names = sorted(allowed)
    listed = ", ".join(names) if len(names) <= 24 else ", ".join(names[:24]) + f", ... ({len(names)} in all)"
    return f"unknown {kind} {shown(name)}.{nearest(name, names)} Allowed: {listed}."

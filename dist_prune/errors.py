"""What a person is told when something is wrong: what, where, what is allowed, what to do."""

import difflib
from collections.abc import Iterable

MISSED = (
    3  # exit code of a run that is finished, and whose network is not as large as its target asks (target.tolerance)
)


class PruneError(ValueError):
    """An error whose text is written for the user; the command line prints it without a traceback.

    Attributes:
        code: the exit code of a command that ends with it.
    """

    code = 2


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` where something allowed looks like ``name``, else an empty string."""
    found = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> str:
    """A sentence for an unknown name: what it is, the nearest one, all that are allowed."""
    names = sorted(allowed)
    shown = ", ".join(names) if len(names) <= 24 else ", ".join(names[:24]) + f", ... ({len(names)} in all)"
    return f"unknown {kind} {name!r}.{nearest(name, names)} Allowed: {shown}."

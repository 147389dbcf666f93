"""Which measured times can be relied on, and how two of them are compared. A ratio is a speed-up: 1.23x is faster."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FAR = 1.25  # a median so far above the best pass: other work had the machine
TWINS = 1.15  # two networks of one architecture whose medians are so far apart
DOUBTFUL = "not reliable"


def timing_doubts(
    medians: Mapping[str, float], best: Mapping[str, float], twins: Iterable[Sequence[str]]
) -> dict[str, str]:
    """Why times say more of the machine's mood than of the networks.

    Args:
        medians: name -> median time of a network.
        best: name -> its best pass, of all that were timed.
        twins: groups of names of networks with one architecture, which must take one time.

    Returns:
        name -> reason; empty where all can be relied on.
    """
    out = {
        name: f"the median pass took {median / best[name]:.2f} times as long as the best one"
        for name, median in medians.items()
        if median > FAR * best[name]
    }
    for names in twins:
        slow, fast = max(names, key=medians.__getitem__), min(names, key=medians.__getitem__)
        if medians[slow] > TWINS * medians[fast]:
            ratio = medians[slow] / medians[fast]
            why = f"{slow} and {fast} are of one architecture, and one took {ratio:.2f} times as long"
            for name in names:
                out.setdefault(name, why)
    return out


def is_reliable(figures: Mapping[str, Any]) -> bool:
    """Whether a measured time can be relied on; reports of older versions have the median and the best pass only."""
    found = figures.get("reliable")
    return bool(found) if found is not None else figures["ms"] <= FAR * figures.get("ms_best", figures["ms"])


def speedup(dense: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """How many times faster ``other`` is than ``dense``, or None where one of the times is not reliable."""
    return dense["ms"] / other["ms"] if is_reliable(dense) and is_reliable(other) else None


def speedup_text(dense: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The speed-up in words."""
    found = speedup(dense, other)
    return DOUBTFUL if found is None else f"{found:.2f}x"

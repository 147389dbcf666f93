"""Noise of measured times: which of them are reliable, and the speed-up between two. A ratio of 1.23x is faster."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FAR = 1.25  # median / best pass above which other programs have disturbed the timing
TWINS = 1.15  # largest ratio of the medians of two networks of one architecture
DOUBTFUL = "not reliable"


def timing_doubts(
    medians: Mapping[str, float], best: Mapping[str, float], twins: Iterable[Sequence[str]]
) -> dict[str, str]:
    """Find the times that are not reliable, because other programs disturbed them.

    Args:
        medians: name of a network -> median time in seconds.
        best: name -> time of its fastest pass in seconds.
        twins: groups of names of networks of one architecture, whose times must be equal.

    Returns:
        Name -> reason; empty if all times are reliable.
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
            reason = f"{slow} and {fast} are of one architecture, and one took {ratio:.2f} times as long"
            for name in names:
                out.setdefault(name, reason)
    return out


def is_reliable(figures: Mapping[str, Any]) -> bool:
    """Whether a measured time is reliable.

    Args:
        figures: of one network at one batch size, as ``latency.measure_latency`` returns them. Reports of older
            versions have ``ms`` and ``ms_best`` only, or ``ms`` alone.
    """
    reliable = figures.get("reliable")
    return bool(reliable) if reliable is not None else figures["ms"] <= FAR * figures.get("ms_best", figures["ms"])


def speedup(dense: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """The speed-up of ``other`` over ``dense``, a ratio of median times; None if one of them is not reliable.

    Args:
        dense: figures of the dense network (see ``is_reliable``).
        other: figures of the other network at the same batch size.
    """
    return dense["ms"] / other["ms"] if is_reliable(dense) and is_reliable(other) else None


def speedup_text(dense: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The ``speedup`` as a text: "1.23x", or "not reliable"."""
    ratio = speedup(dense, other)
    return DOUBTFUL if ratio is None else f"{ratio:.2f}x"

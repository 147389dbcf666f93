"""Measured times of cut networks on pages: a card, the text of a cell, and where they were measured."""

from collections.abc import Iterable, Mapping
from typing import Any

from dist_prune.report.headline import Card

Facts = Mapping[str, Any]  # of one network, with ``ms``, ``dense_ms``, ``speedup`` and ``reliable`` if it was timed
UNRELIABLE = "?"


def speed_card(times: Facts | None, networks: Iterable[tuple[str, Facts]]) -> Card:
    """The card of the largest speed-up.

    Args:
        times: Where they were measured: ``batch``, ``device``, ``threads``; None if no network was timed.
        networks: Name and facts of each.
    """
    if times is None:
        return Card("speed-up", "not measured", "left out (--no-times), or by an earlier version")
    ratios = [(facts["speedup"], name) for name, facts in networks if facts.get("speedup") is not None]
    if not ratios:
        return Card("speed-up", UNRELIABLE, f"not reliable: other work used the machine; {place_text(times)}")
    ratio, name = max(ratios)
    return Card("largest speed-up", f"{ratio:.2f}x", f"{name}; {place_text(times)}")


def place_text(times: Facts) -> str:
    """Batch size and device of the times, as a part of a sentence."""
    on_cpu = str(times["device"]).startswith("cpu")
    return f"batch {times['batch']} on {times['device']}" + (f", {times['threads']} thread(s)" if on_cpu else "")


def ratio_of(facts: Facts) -> float | None:
    """Dense over cut, reliable or not; None if the network was not timed."""
    return facts["dense_ms"] / facts["ms"] if facts.get("ms") else None


def speed_text(facts: Facts) -> str:
    """The text of a cell: 1.23x, ? if a time is not reliable, empty if the network was not timed."""
    if ratio_of(facts) is None:
        return ""
    return UNRELIABLE if facts["speedup"] is None else f"{facts['speedup']:.2f}x"


def speed_title(facts: Facts) -> str:
    """What a pointer that rests on a cell or a mark reads of the time; empty if the network was not timed."""
    ratio = ratio_of(facts)
    if ratio is None:
        return ""
    doubt = "" if facts["speedup"] is not None else f", not reliable: {facts.get('why') or 'other work was done'}"
    return f"{facts['dense_ms']:.3g} to {facts['ms']:.3g} ms, {ratio:.2f}x{doubt}"

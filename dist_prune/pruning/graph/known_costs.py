"""Costs of a network that layers alone do not tell: measured times, and the peak of its activations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class LatencyTable:
    """Measured times of the dense network with a single group cut to some widths, as shares of the dense time.

    Attributes:
        times: group -> ((kept channels, share of the dense time), ...), widths ascending, the dense one last.
        corrections: (share predicted from ``times``, measured share) of whole networks, ascending in both; empty: no
            correction.
    """

    times: Mapping[str, tuple[tuple[int, float], ...]]
    corrections: tuple[tuple[float, float], ...] = ()

    def correct(self, share: float) -> float:
        """Map a share predicted from ``times`` to a measured share, linearly between the points of ``corrections``."""
        if not self.corrections:
            return share
        raw, measured = zip(*self.corrections, strict=True)
        return float(np.interp(share, raw, measured))


class MemoryCount(Protocol):
    """Counts the peak of activations of the traced network (``pruning/surgery/activation_memory.py``)."""

    def peak(self, kept: Mapping[str, int]) -> int:
        """Count the bytes for one image; groups that are absent in ``kept`` keep all channels."""
        ...

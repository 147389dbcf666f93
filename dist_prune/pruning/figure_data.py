"""What a method hands up for a report's figures: how alike a group's channels are, and how something of it moved."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SimilarityMap:
    """One channel group.

    Attributes:
        group: its name.
        likeness: (C, C) in [0, 1].
        parts: (C,) number of the cluster that a channel lies in, -1 for none.
        kept: (C,) bool.
        said: one line about it.
    """

    group: str
    similarity: np.ndarray
    clusters: np.ndarray
    kept: np.ndarray
    caption: str


@dataclass(frozen=True)
class Curve:
    """How something of one channel group moved.

    Attributes:
        group: its name.
        x, y: (n,) points.
        axes: what x and y are; curves of the same axes share a plot.
    """

    group: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    axes: tuple[str, str]

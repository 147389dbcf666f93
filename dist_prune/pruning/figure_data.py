"""Data of a report's figures that methods provide: similarity matrices of channel groups, and curves."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SimilarityMap:
    """Similarities of the channels of one group.

    Attributes:
        group: name of the channel group.
        similarity: (C, C) floating point in [0, 1], symmetric.
        clusters: (C,) integers, the number of each channel's cluster; -1 for a channel in no cluster.
        kept: (C,) bool, True for channels that the plan keeps.
        caption: one line about the group.
    """

    group: str
    similarity: np.ndarray
    clusters: np.ndarray
    kept: np.ndarray
    caption: str


@dataclass(frozen=True)
class Curve:
    """A curve of one channel group, for example of its entropy over the number of removed channels.

    Attributes:
        group: name of the channel group.
        x: (n,) horizontal coordinates.
        y: (n,) vertical coordinates.
        axes: titles of the x axis and the y axis; curves of the same axes share a plot.
    """

    group: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    axes: tuple[str, str]

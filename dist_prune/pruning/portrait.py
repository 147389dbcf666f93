"""What a group's channels look like to a method, as a small picture: who is like whom, and what became of them."""

from dataclasses import dataclass

import numpy as np

# parts in the order of their size, then again from the first; grey for channels that are like no other
_COLOURS = np.array(
    [
        [31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40], [148, 103, 189], [140, 86, 75], [227, 119, 194],
        [188, 189, 34], [23, 190, 207], [174, 199, 232], [255, 187, 120], [152, 223, 138],
    ],
    dtype=np.uint8,
)  # fmt: skip
_ALONE = np.array([210, 214, 220], dtype=np.uint8)


@dataclass(frozen=True)
class Portrait:
    """One channel group.

    Attributes:
        group: its name.
        likeness: (C, C) in [0, 1].
        parts: (C,) number of the cluster that a channel lies in, -1 for none.
        kept: (C,) bool.
        said: one line about it.
    """

    group: str
    likeness: np.ndarray
    parts: np.ndarray
    kept: np.ndarray
    said: str

    def picture(self, side: int = 128) -> np.ndarray:
        """(h, w, 3) uint8, at most ``side`` cells wide: the likeness with parts side by side (dark: alike), to its left
        the parts' colours and, dark, the channels that stay."""
        order = np.lexsort((~self.kept, np.where(self.parts < 0, len(self.parts), self.parts)))
        cells = min(side, len(order))
        starts = np.linspace(0, len(order), cells, endpoint=False).astype(int)
        counts = np.diff(np.append(starts, len(order)))
        rows = np.add.reduceat(self.likeness[np.ix_(order, order)], starts, axis=0)
        mean = np.add.reduceat(rows, starts, axis=1) / (counts[:, None] * counts[None, :])
        grey = (255 * (1 - np.clip(2 * mean - 1, 0, 1))).astype(np.uint8)  # random bits agree by a half: white
        inner = np.repeat(grey[:, :, None], 3, axis=2)
        at = order[starts]  # a cell has the colour of its first channel
        colour = np.where(self.parts[at, None] < 0, _ALONE, _COLOURS[self.parts[at] % len(_COLOURS)])
        share = np.add.reduceat(self.kept[order].astype(float), starts) / counts
        stays = np.repeat((255 - 220 * share).astype(np.uint8)[:, None], 3, axis=1)
        width = max(2, cells // 16)
        strips = [np.repeat(strip[:, None], width, axis=1) for strip in (colour, stays)]
        return np.concatenate([*strips, inner], axis=1)


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

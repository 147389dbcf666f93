"""Blocks of weights that are cut (set to zero) inside a layer, in coordinates of the dense network."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import DependencyGraph, Side

Indices = tuple[int, ...]


@dataclass(frozen=True)
class WeightBlocks:
    """The zero blocks of one layer's weight (out, in, ...): output channels x input channels, with whole kernels.

    With ``rows`` ((0, 1), (2, 3)), ``columns`` ((0, 1, 2),) and ``cut`` ((0,), ()), the kernels from inputs 0 to 2 to
    outputs 0 and 1 are zero.

    Attributes:
        rows: groups of output channels; ascending within a group, no channel in two groups.
        columns: groups of input channels, likewise.
        cut: for each group of rows, the numbers of the groups of columns whose weights are zero, ascending.

    Raises:
        PruneError: a group is empty or not ascending, a channel is in two groups, or ``cut`` does not fit them.
    """

    rows: tuple[Indices, ...]
    columns: tuple[Indices, ...]
    cut: tuple[Indices, ...]

    def __post_init__(self):
        for name, parts in (("rows", self.rows), ("columns", self.columns)):
            flat = [i for part in parts for i in part]
            if len(set(flat)) != len(flat) or any(not p or list(p) != sorted(p) or p[0] < 0 for p in parts):
                raise PruneError(f"blocks: {name} must be groups of ascending channels, none of them in two groups")
        if len(self.cut) != len(self.rows):
            raise PruneError(f"blocks: cut has {len(self.cut)} entries for {len(self.rows)} groups of rows")
        if any(list(c) != sorted(set(c)) or (c and not 0 <= c[0] <= c[-1] < len(self.columns)) for c in self.cut):
            raise PruneError(f"blocks: cut must name ascending groups of columns below {len(self.columns)}")

    @classmethod
    def of(cls, rows: Iterable[Iterable[int]], columns: Iterable[Iterable[int]], cut: Iterable[Iterable[int]]):
        """Make blocks from any nested sequences of integers."""
        return cls(*(tuple(tuple(int(i) for i in part) for part in parts) for parts in (rows, columns, cut)))

    @property
    def empty(self) -> bool:
        """Whether no block is cut."""
        return not any(self.cut)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain lists, for JSON."""
        return {
            "rows": [list(r) for r in self.rows],
            "columns": [list(c) for c in self.columns],
            "cut": [list(c) for c in self.cut],
        }

    def to_dense(self, rows: Sequence[int], columns: Sequence[int]) -> "WeightBlocks":
        """Return the same blocks in a wider layer, in which row i is ``rows[i]`` and column j is ``columns[j]``."""
        return WeightBlocks.of(
            ([rows[i] for i in part] for part in self.rows),
            ([columns[j] for j in part] for part in self.columns),
            self.cut,
        )

    def union(self, other: "WeightBlocks") -> "WeightBlocks":
        """Return the blocks that either of the two cuts, on the common refinement of their groups."""
        rows, columns = _refine(self.rows, other.rows), _refine(self.columns, other.columns)
        self_cut, other_cut = ([set(part) for part in blocks.cut] for blocks in (self, other))
        empty: set[int] = set()
        cut = []
        for a, b in rows:
            here, there = (empty if a is None else self_cut[a]), (empty if b is None else other_cut[b])
            cut.append([n for n, (c, d) in enumerate(columns) if c in here or d in there])
        return WeightBlocks.of(rows.values(), columns.values(), cut)


def _refine(first: Sequence[Indices], second: Sequence[Indices]) -> dict[tuple[int | None, int | None], list[int]]:
    """(group in the first, group in the second; None: in none) -> indices, ordered by the smallest index."""
    group_of: list[dict[int, int]] = [{i: n for n, part in enumerate(parts) for i in part} for parts in (first, second)]
    refined: dict[tuple[int | None, int | None], list[int]] = {}
    for i in sorted(group_of[0].keys() | group_of[1].keys()):
        refined.setdefault((group_of[0].get(i), group_of[1].get(i)), []).append(i)
    return refined


def remaining_positions(
    graph: DependencyGraph, removed: Mapping[str, Iterable[int]]
) -> dict[tuple[str, Side], list[int]]:
    """Compute the positions that remain in every layer after pruning.

    Args:
        graph: dependency graph of the dense network.
        removed: group -> removed channels; groups that are absent lose none.

    Returns:
        (layer, side) -> remaining positions of the dense layer, ascending.
    """
    gone: dict[tuple[str, Side], set[int]] = {}
    for group, channels in removed.items():
        channels = set(channels)
        for coupling in graph.group(group).couplings:
            gone.setdefault((coupling.layer, coupling.side), set()).update(coupling.positions(channels))
    sides: tuple[Side, Side] = ("out", "in")
    return {
        (name, side): [i for i in range(width) if i not in gone.get((name, side), ())]
        for name, layer in graph.layers.items()
        for side, width in zip(sides, (layer.width_out, layer.width_in), strict=True)
    }

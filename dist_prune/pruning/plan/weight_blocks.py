"""Blocks of weights that are cut (zeroed) inside a layer, in the coordinates of the dense network."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_prune.errors import PruneError
from dist_prune.pruning.graph.groups import DependencyGraph, Side

Indices = tuple[int, ...]


@dataclass(frozen=True)
class WeightBlocks:
    """What is zero in one layer's weight (out, in, ...): blocks of output channels x input channels, whole kernels.

    Attributes:
        rows: groups of output channels; ascending inside a group, no channel in two of them.
        columns: groups of input channels, likewise.
        cut: for each group of rows, the groups of columns (ascending) whose weights are zero.
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
        """From any nested sequences of integers."""
        return cls(*(tuple(tuple(int(i) for i in part) for part in parts) for parts in (rows, columns, cut)))

    @property
    def empty(self) -> bool:
        return not any(self.cut)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return {
            "rows": [list(r) for r in self.rows],
            "columns": [list(c) for c in self.columns],
            "cut": [list(c) for c in self.cut],
        }

    def to_dense(self, rows: Sequence[int], columns: Sequence[int]) -> "WeightBlocks":
        """The same blocks in a wider layer, where row i is ``rows[i]`` and column j is ``columns[j]``."""
        return WeightBlocks.of(
            ([rows[i] for i in part] for part in self.rows),
            ([columns[j] for j in part] for part in self.columns),
            self.cut,
        )

    def union(self, other: "WeightBlocks") -> "WeightBlocks":
        """What either of the two cuts, on the common refinement of their groups."""
        rows, columns = _refined(self.rows, other.rows), _refined(self.columns, other.columns)
        mine, theirs = ([set(part) for part in blocks.cut] for blocks in (self, other))
        empty: set[int] = set()
        cut = []
        for a, b in rows:
            here, there = (empty if a is None else mine[a]), (empty if b is None else theirs[b])
            cut.append([n for n, (c, d) in enumerate(columns) if c in here or d in there])
        return WeightBlocks.of(rows.values(), columns.values(), cut)


def _refined(first: Sequence[Indices], second: Sequence[Indices]) -> dict[tuple[int | None, int | None], list[int]]:
    """(group in the first, group in the second; None: in none) -> indices, in the order of their smallest one."""
    places: list[dict[int, int]] = [{i: n for n, part in enumerate(parts) for i in part} for parts in (first, second)]
    out: dict[tuple[int | None, int | None], list[int]] = {}
    for i in sorted(places[0].keys() | places[1].keys()):
        out.setdefault((places[0].get(i), places[1].get(i)), []).append(i)
    return out


def remaining_positions(
    graph: DependencyGraph, removed: Mapping[str, Iterable[int]]
) -> dict[tuple[str, Side], list[int]]:
    """(layer, side) -> positions of the dense layer that are still there once ``removed[group]`` is gone."""
    gone: dict[tuple[str, Side], set[int]] = {}
    for group, chosen in removed.items():
        chosen = set(chosen)
        for coupling in graph.group(group).couplings:
            gone.setdefault((coupling.layer, coupling.side), set()).update(coupling.positions(chosen))
    sides: tuple[Side, Side] = ("out", "in")
    return {
        (name, side): [i for i in range(width) if i not in gone.get((name, side), ())]
        for name, layer in graph.layers.items()
        for side, width in zip(sides, (layer.width_out, layer.width_in), strict=True)
    }

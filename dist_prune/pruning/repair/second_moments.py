"""Second moments of a layer's inputs and errors that add up exactly: the same bits for every number of ranks.

Each micro-batch adds its sums of products as integers: a high part in units of 2^-8 and a low part in units of
2^-50. Integers add exactly in any order, so the totals depend on the micro-batches alone.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dist_prune.errors import PruneError
from dist_prune.pruning.repair.regression_rows import Piece

HIGH, LOW = 2.0**8, 2.0**50
LIMIT = 2.0**50  # of one sum of a micro-batch: 2^54 units of HIGH overflow neither a float64 nor 2^5 micro-batches


class ExactSum:
    """A float64 tensor that is summed exactly over micro-batches and ranks.

    Attributes:
        parts: (2, *shape) int64, the high and the low part.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device):
        self.parts = torch.zeros((2, *shape), dtype=torch.int64, device=device)

    def add(self, value: Tensor) -> None:
        """Add the sum of one micro-batch.

        Args:
            value: float64 of the shape.

        Raises:
            PruneError: a value is not finite, or too large.
        """
        add_exactly(self.parts, value)

    @property
    def total(self) -> Tensor:
        """The sum, float64."""
        return exact_total(self.parts)


def add_exactly(parts: Tensor, value: Tensor) -> None:
    """Add a float64 tensor to its integer parts (2, *shape), in place; PruneError if it is not finite or too large."""
    check_range(value)
    add_parts(parts, value)


def check_range(value: Tensor) -> None:
    """PruneError if a float64 tensor is not finite or too large to be added; the host waits for the answer."""
    if not bool((value.abs() < LIMIT).all()):
        raise PruneError(
            "a sum of squares of activations is not finite or above 1e15: the network overflows on these images"
        )


def add_parts(parts: Tensor, value: Tensor) -> None:
    """Add a float64 tensor whose range is known to its integer parts (2, *shape), in place."""
    high = (value * HIGH).round()
    parts[0] += high.long()
    parts[1] += ((value - high / HIGH) * LOW).round().long()


def exact_total(parts: Tensor) -> Tensor:
    """The float64 sum of integer parts (2, *shape)."""
    return parts[0].double() / HIGH + parts[1].double() / LOW


class SecondMoments:
    """Sums of products of a layer's inputs x and errors r, in two halves of the images.

    The halves choose the ridge: the solution of one half is judged on the other one.

    Args:
        groups: groups of a grouped convolution, g; 1 for other layers. Depthwise: one per channel.
        inputs: inputs of one output, d: the entries of a patch.
        outputs: outputs of one group, o.
        device: where the tables are.

    Attributes:
        halves: two dicts of sums: ``xx`` (g, d, d), ``xr`` (g, d, o), ``x`` (g, d), ``r`` (g, o), ``rr`` (g, o),
            ``n`` (1).
    """

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device):
        shapes = {
            "xx": (groups, inputs, inputs),
            "xr": (groups, inputs, outputs),
            "x": (groups, inputs),
            "r": (groups, outputs),
            "rr": (groups, outputs),
            "n": (1,),
        }
        self.halves = tuple({name: ExactSum(shape, device) for name, shape in shapes.items()} for _ in range(2))

    def update(self, half: int, rows: Iterator[Piece]) -> None:
        """Add the rows of one micro-batch.

        Args:
            half: 0 or 1.
            rows: of ``rows_of``.
        """
        tables = self.halves[half]
        sums = {name: torch.zeros_like(table.parts[0], dtype=torch.float64) for name, table in tables.items()}
        for groups, x, r in rows:
            sums["xx"][groups] += x @ x.transpose(1, 2)
            sums["xr"][groups] += x @ r.transpose(1, 2)
            sums["x"][groups] += x.sum(2)
            sums["r"][groups] += r.sum(2)
            sums["rr"][groups] += r.square().sum(2)
            sums["n"] += x.shape[2] * (groups.start == 0)
        for name, value in sums.items():
            tables[name].add(value)

    @property
    def tables(self) -> list[Tensor]:
        """The integer tables, to be summed over ranks in place."""
        return [table.parts for half in self.halves for table in half.values()]

    def totals(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The sums of both halves, float64."""
        first, second = ({name: table.total for name, table in half.items()} for half in self.halves)
        return first, second

    @staticmethod
    def nbytes(groups: int, inputs: int, outputs: int) -> int:
        """Bytes of the tables."""
        return 2 * 2 * 8 * groups * (inputs * inputs + inputs * outputs + inputs + 2 * outputs)
